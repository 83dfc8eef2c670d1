"""Signs that a differentiable search collapses, looked for after every epoch.

skips: more than two skip connections in the derived normal cell (Liang et al. 2019, DARTS+,
    arXiv 1909.06035).
parameter_free: no operation with weights in a derived cell.
eigenvalue: the dominant eigenvalue of the Hessian of the validation loss by alpha has grown by a
    third against five measurements before, as means of five (Zela et al. 2020, arXiv 1909.09656,
    section 4: stop when ``l(t - 5) / l(t) < 0.75``).
"""

from __future__ import annotations

from collections.abc import Sequence

from dass.genotype import Genotype

__all__ = ["signs_of_collapse"]

MOST_SKIPS = 2
WINDOW = 5
RATIO = 0.75


def signs_of_collapse(genotype: Genotype, eigenvalues: Sequence[float]) -> list[str]:
    """One sentence per sign, each beginning with its name; empty if there is none."""
    signs = []
    skips = genotype.skips()["normal"]
    if skips > MOST_SKIPS:
        signs.append(f"skips: {skips} of 8 edges of the normal cell only pass on")
    for kind, share in genotype.parameter_free().items():
        if share == 1:
            signs.append(f"parameter_free: no operation of the {kind} cell has weights")
    if len(eigenvalues) >= 2 * WINDOW:
        now = sum(eigenvalues[-WINDOW:]) / WINDOW
        before = sum(eigenvalues[-2 * WINDOW : -WINDOW]) / WINDOW
        if now > 0 and before / now < RATIO:
            signs.append(f"eigenvalue: rose from {before:.3g} to {now:.3g} in {WINDOW} epochs")
    return signs
