"""`%blocks`, `%timeline` and `%dashboard`: the live views, of the current engine or of what is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nbengine.notebook.options import Parser
from nbengine.trace import Trace

if TYPE_CHECKING:
    from nbengine.notebook.session import Session

VIEWS = {  # by the name of the magic: the class in nbengine.widgets, and what it shows
    "blocks": ("BlockTableView", "Every physical KV block as a cell, the page table of a sequence, and what is in a block."),
    "dashboard": ("Dashboard", "Charts of the cache, batches, throughput and latency over one time axis; load and limits."),
    "timeline": ("Timeline", "A lane for each request, and the batch of a step in cross-section."),
}


def view_parser(name: str) -> Parser:
    """The options of one view's magic."""
    parser = Parser(prog=f"%{name}", description=VIEWS[name][1])
    parser.add_argument("source", nargs="?", metavar="NAME", help="an engine by name, or a variable that holds an engine or a trace")
    if name == "timeline":
        parser.add_argument("--steps", type=int, metavar="N", help="how many steps are shown at once")
    if name == "dashboard":
        parser.add_argument("--charts", choices=("plotly", "pictures"), help="pictures, where plotly does not load")
    return parser


def open_view(session: Session, name: str, line: str, variables: Mapping[str, Any]) -> Any:
    """Make the view that a line asks for."""
    from nbengine import widgets

    given = vars(view_parser(name).parse_line(line))
    wanted = given.pop("source")
    held = variables.get(wanted)
    source = held if isinstance(held, Trace) else session.engines.find(wanted, variables)
    return getattr(widgets, VIEWS[name][0])(source, **{option: value for option, value in given.items() if value is not None})
