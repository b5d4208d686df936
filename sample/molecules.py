# SPDX-License-Identifier: Apache-2.0
"""Synthetic small molecules, put together from fragments, with their topological polar surface area."""

from __future__ import annotations

import math

from dice import Dice

Fragment = tuple[str, float]


def fragments(table: dict[float, str]) -> list[Fragment]:
    """Return a table's fragments, each with the polar surface area it adds."""
    return [(text, area) for area, texts in table.items() for text in texts.split()]


# What each fragment adds to the topological polar surface area: the contributions of Ertl, Rohde and
# Selzer 2000, J. Med. Chem. 43:3714-3717, nitrogen and oxygen only, added up by hand.
HEADS = fragments(
    {
        0.0: "C CC CCC CC(C) CC(C)(C) Cl Br F c1ccccc1 C1CCCC1 C[N+](C)(C)",
        3.24: "CN(C)",
        9.23: "CO",
        12.89: "c1ccncc1",
        20.23: "O",
        23.79: "N#C",
        26.02: "N",
        43.14: "O=[N+]([O-])",
    }
)
LINKS = fragments(
    {
        0.0: "C CC C(C) C=C C(Cl) C(CC) C(Br) c1ccc(cc1) c1cccc(c1) C1CCC(CC1) c1ccc(s1)",
        3.24: "N(C)",
        6.48: "N1CCN(CC1)",
        9.23: "O",
        12.03: "N",
        12.89: "c1ccc(nc1)",
        13.14: "c1ccc(o1)",
        15.79: "c1ccc([nH]1)",
        17.07: "C(=O)",
        20.23: "C(O) [C@@H](O)",
        23.79: "C(C#N)",
        26.02: "C(N)",
        26.3: "OC(=O)",
        29.1: "NC(=O)",
    }
)
TAILS = fragments(
    {
        0.0: "C CC C(C)C C(C)(C)C Cl Br F C=C c1ccccc1 c1ccc(Cl)cc1",
        9.23: "OC",
        12.89: "c1cccnc1",
        17.07: "C=O",
        20.23: "O",
        23.79: "C#N",
        26.02: "N",
        27.64: "[NH3+]",
        37.3: "C(=O)O",
        43.09: "C(N)=O",
        43.14: "[N+](=O)[O-]",
    }
)
# Fragments whose right-hand end is not a carbon.
HETERO_ENDS = {"Cl", "Br", "F", "O", "N", "CO", "CN(C)", "O=[N+]([O-])", "C[N+](C)(C)", "N(C)", "N1CCN(CC1)"}


def joins(left: str, right: str) -> bool:
    """Tell whether two fragments may be neighbours: no two hetero atoms side by side."""
    starts = right[0] in "ONFB" or right.startswith(("Cl", "[N"))
    return not (starts and left in HETERO_ENDS)


def make_molecule(dice: Dice) -> tuple[str, float]:
    """Put a molecule together from a head, links and a tail; return its SMILES and polar surface."""
    while True:
        parts = [dice.pick(HEADS)]
        parts += [dice.pick(LINKS) for _ in range(dice.between(0, 4))]
        parts.append(dice.pick(TAILS))
        smiles = "".join(text for text, _ in parts)
        texts = [text for text, _ in parts]
        if 3 <= len(smiles) <= 40 and all(map(joins, texts, texts[1:])):
            return smiles, round(math.fsum(area for _, area in parts), 2)


def molecule_rows(dice: Dice, count: int) -> list[dict[str, str]]:
    """Return distinct molecules.

    No two have the same atoms: the same molecule may be written from either end, and telling that apart
    from a real difference would take a chemistry library.
    """
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        smiles, area = make_molecule(dice)
        atoms = "".join(sorted(char for char in smiles if char.isalpha()))
        rows.setdefault(atoms, {"smiles": smiles, "tpsa": f"{area:.2f}"})
    return dice.shuffled(rows.values())  # the last ones are larger: the small ones are used up
