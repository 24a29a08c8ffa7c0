"""Colours that the colour-blind tell apart, as the scripts have them (frame.js)."""

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800")  # Okabe and Ito's, the yellow darkened


def colour_of(uid: int) -> str:
    return PALETTE[uid % len(PALETTE)]
