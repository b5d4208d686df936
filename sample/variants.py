# SPDX-License-Identifier: Apache-2.0
"""A made-up protein family whose sites are coupled in pairs: natural members, and variants with a fitness.

Four helices of eight sites and a loop of two. In a helix the side chains at i and i + 4 are one turn apart and touch;
three such contacts each, two of opposite charges and one of a large and a small side chain. Which of the two
comes first is drawn for each protein, so a residue by itself says nothing about whether its contact is made: fitness
counts the contacts that are made, a sum over pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dice import Dice

HELICES, TURN, LENGTH = 4, 4, 10
CHARGE, SIZE = ("KR", "DE"), ("FWY", "AGS")  # two classes of residues each, of which a contact takes one each
KINDS = (CHARGE, SIZE, CHARGE)  # of the contacts of a helix
CORE = "ILVMPTNQHC"  # conserved, so a site can be told by its surroundings; never part of a contact
KEPT = 0.95  # selection: the share of contacts that natural members make, and of core sites as in the founder
MUTATIONS = (0, 16)
NOISE = 0.5
Residues = list[str]


@dataclass(frozen=True)
class Contact:
    """Two coupled sites, counted from 0, and the classes of residues that they take."""

    first: int
    second: int
    kind: tuple[str, str]

    def made(self, residues: Residues) -> bool:
        """Whether the two residues are of different classes."""
        return (residues[self.first] in self.kind[0]) != (residues[self.second] in self.kind[0])


class Family:
    """Draws members and variants of one family, never the same sequence twice."""

    def __init__(self, dice: Dice) -> None:
        """Choose the residues of the core, no two alike."""
        starts = range(0, HELICES * LENGTH, LENGTH)
        self._contacts = [
            Contact(start + site, start + site + TURN, kind) for start in starts for site, kind in enumerate(KINDS)
        ]
        places = [start + site for start in starts for site in (TURN - 1, 2 * TURN - 1)]
        self._core = dict(zip(places, dice.shuffled(CORE), strict=False))
        self._loops = [start + site for start in starts for site in (2 * TURN, 2 * TURN + 1)]
        self._seen: set[str] = set()

    def member(self, dice: Dice) -> str:
        """A natural member, in which selection has kept most contacts."""
        return self._unseen(lambda: self._member(dice))

    def variant(self, dice: Dice) -> dict[str, str]:
        """A member with random mutations, and its fitness: the contacts that are made, plus noise."""
        residues: Residues = []

        def draw() -> Residues:
            residues[:] = self._member(dice)
            for site in dice.shuffled(self._choices())[: dice.between(*MUTATIONS)]:
                residues[site] = dice.pick(self._choices()[site])
            return residues

        sequence = self._unseen(draw)
        made = sum(contact.made(residues) for contact in self._contacts)
        return {"sequence": sequence, "fitness": f"{made + NOISE * dice.normal():.3f}"}

    def _member(self, dice: Dice) -> Residues:
        residues = [""] * (HELICES * LENGTH)
        for site, letter in self._core.items():
            residues[site] = letter if dice.chance(KEPT) else dice.pick(CORE)
        for site in self._loops:
            residues[site] = dice.pick(self._choices()[site])
        for contact in self._contacts:
            side = dice.between(0, 1)
            other = 1 - side if dice.chance(KEPT) else side
            residues[contact.first] = dice.pick(contact.kind[side])
            residues[contact.second] = dice.pick(contact.kind[other])
        return residues

    def _choices(self) -> dict[int, str]:
        """What a site outside the core may hold; loops hold the residues of contacts, so their number says little."""
        found = dict.fromkeys(self._loops, "".join(CHARGE + SIZE))
        for contact in self._contacts:
            found[contact.first] = found[contact.second] = "".join(contact.kind)
        return found

    def _unseen(self, draw: Callable[[], Residues]) -> str:
        while (sequence := "".join(draw())) in self._seen:
            pass
        self._seen.add(sequence)
        return sequence
