"""Make `tales`: three teachers, each without a third of the stories, and their soft targets; a student of stories and
targets; a short stage on conversations. `tales` is the mean of the student before and after that stage.

python -m training.make --corpus FOLDER --out FOLDER
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from training.export import average
from training.model import SIZES
from training.soften import soften
from training.train import Recipe, Run, fit

FOLDS = 3
TEACHER = Recipe(epochs=10.0, lr=0.005, weight_decay=1.0, dropout=0.25, chat=0.0)
STUDENT = Recipe()
MANNERS = Recipe(epochs=1.0, lr=0.003, warmup=20, chat=0.5, chat_from=0.0)

MINIATURE = {"epochs": 0.15, "batch": 4, "length": 64, "warmup": 5, "reports": 2}


def make(corpus: Path, out: Path, size: str = "base", teacher_size: str = "teacher", **changes: float) -> None:
    """Run the whole recipe; `changes` go to every stage, to try it in miniature."""
    work, soft = out / "work", out / "soft"
    for fold in range(FOLDS):
        teacher = Run(corpus, out / f"teacher{fold}", teacher_size, work, fold=fold, folds=FOLDS)
        fit(teacher, replace(TEACHER, **changes))
        soften(work, teacher.out, fold, FOLDS, soft)
    student = Run(corpus, out / "student", size, work, soft_targets=soft)
    fit(student, replace(STUDENT, **changes))
    manners = Run(corpus, out / "manners", size, work, start=student.out)
    fit(manners, replace(MANNERS, **changes))
    average([student.out, manners.out], out / "tales")


def main() -> None:
    """Read the command line and make the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the two corpus files")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made; the model is in OUT/tales")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--teacher-size", choices=SIZES, default="teacher", help="of the same vocabulary")
    parser.add_argument("--miniature", action="store_true", help="tiny models and a few steps, to see it work on a CPU")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.miniature:
        make(args.corpus, args.out, "tiny", "tiny", **MINIATURE)
    else:
        make(args.corpus, args.out, args.size, args.teacher_size)


if __name__ == "__main__":
    main()
