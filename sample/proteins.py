# SPDX-License-Identifier: Apache-2.0
"""Synthetic proteins with known structure, drawn from a segmental model of helix, strand and coil.

Residues are drawn by published propensities. Three things tie residues to others: helices with one
wet side, paired strands, and families whose members share a fold.

Floats are added with ``math.fsum`` (``sum`` changed in Python 3.12), and what comes out of ``exp`` and
``cos``, whose last digit may differ between machines, is rounded before it is used.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field

from dice import Dice

# One row per residue: share in percent (UniProtKB/Swiss-Prot release 2013_04); P(alpha), P(beta) and P(turn)
# (Chou and Fasman 1978, Adv. Enzymol. 47:45-148); hydropathy (Kyte and Doolittle 1982, J. Mol. Biol.
# 157:105-132).
RESIDUES: dict[str, tuple[float, float, float, float, float]] = {
    "A": (8.25, 1.42, 0.83, 0.66, 1.8),
    "R": (5.53, 0.98, 0.93, 0.95, -4.5),
    "N": (4.06, 0.67, 0.89, 1.56, -3.5),
    "D": (5.45, 1.01, 0.54, 1.46, -3.5),
    "C": (1.37, 0.70, 1.19, 1.19, 2.5),
    "Q": (3.93, 1.11, 1.10, 0.98, -3.5),
    "E": (6.75, 1.51, 0.37, 0.74, -3.5),
    "G": (7.07, 0.57, 0.75, 1.56, -0.4),
    "H": (2.27, 1.00, 0.87, 0.95, -3.2),
    "I": (5.96, 1.08, 1.60, 0.47, 4.5),
    "L": (9.66, 1.21, 1.30, 0.59, 3.8),
    "K": (5.84, 1.16, 0.74, 1.01, -3.9),
    "M": (2.42, 1.45, 1.05, 0.60, 1.9),
    "F": (3.86, 1.13, 1.38, 0.60, 2.8),
    "P": (4.70, 0.57, 0.55, 1.52, -1.6),
    "S": (6.56, 0.77, 0.75, 1.43, -0.8),
    "T": (5.34, 0.83, 1.19, 0.96, -0.7),
    "W": (1.08, 1.08, 1.37, 0.96, -0.9),
    "Y": (2.92, 0.69, 1.47, 1.14, -1.3),
    "V": (6.87, 1.06, 1.70, 0.50, 4.2),
}
LETTERS = "".join(RESIDUES)
HYDROPATHY = {letter: row[4] for letter, row in RESIDUES.items()}
CLASSES = {"+": "KR", "-": "DE", "hydrophobic": "AVILMFCWY", "polar": "STNQHGP"}
CLASS_OF = {letter: name for name, letters in CLASSES.items() for letter in letters}
STATE = {"helix": "H", "membrane": "H", "strand": "E", "coil": "C", "loose": "C"}
LENGTHS = (40, 120)
FAMILIES = 24
FAMILY_SHARE = 0.75


@dataclass(frozen=True)
class Site:
    """One place in a fold: tilt is 1 where it faces the core and -1 where it faces the water."""

    key: int
    kind: str
    tilt: float = 0.0
    mate: int | None = None


@dataclass
class Protein:
    """A fold's sites in order, and the residue at each, by the site's key."""

    sites: list[Site]
    residues: dict[int, str]

    @property
    def sequence(self) -> str:
        """The residues as one string."""
        return "".join(self.residues[site.key] for site in self.sites)


@dataclass
class Fold:
    """Lays segments end to end; a strand may pair with an earlier one, antiparallel."""

    dice: Dice
    sites: list[Site] = field(default_factory=list)

    def run(self, kind: str, low: int, high: int) -> None:
        """Add a stretch of one kind; helices turn by 100 degrees a residue (3.6 residues a turn)."""
        phase = 20 * self.dice.between(0, 17)
        for step in range(self.dice.between(low, high)):
            turn = round(math.cos(math.radians(100 * step + phase)), 3)
            self.sites.append(Site(len(self.sites), kind, turn if kind == "helix" else 0.0))

    def pair(self, far: bool) -> None:
        """Add two paired strands, either a hairpin or with a helix between them."""
        length, side = self.dice.between(5, 8), self.dice.pick((-1.0, 1.0))
        first = list(range(len(self.sites), len(self.sites) + length))
        self.sites += [Site(key, "strand", side * (-1) ** step) for step, key in enumerate(first)]
        self.run("coil", 3, 5)
        if far:
            self.run("helix", 8, 15)
            self.run("coil", 3, 6)
        for mate in reversed(first):  # paired residues face the same way
            self.sites.append(Site(len(self.sites), "strand", self.sites[mate].tilt, mate))


def plan(dice: Dice, membrane: bool) -> list[str]:
    """Choose a fold's units, in order: about as many as the length that was drawn has room for."""
    cost = {"membrane": 25, "helix": 16, "hairpin": 22, "far": 38}
    units = ["membrane"] * dice.between(1, 2) if membrane else []
    room = dice.between(32, 105) - 25 * len(units)
    lean = dice.pick(((6, 1, 1), (2, 2, 2), (1, 4, 2)))  # mostly helix, mixed, mostly strand
    while room > 8:
        units.append(dice.weighted(("helix", "hairpin", "far"), lean))
        room -= cost[units[-1]]
    return dice.shuffled(units)


def make_fold(dice: Dice, membrane: bool) -> list[Site]:
    """Lay out one fold; draw again until its length leaves room for insertions and deletions."""
    while True:
        fold = Fold(dice)
        fold.run("loose", 0, 5)
        fold.run("coil", 1, 3)
        for unit in plan(dice, membrane):
            if unit == "membrane":
                fold.run("membrane", 18, 22)
            elif unit == "helix":
                fold.run("helix", 8, 18)
            else:
                fold.pair(far=unit == "far")
            fold.run("loose" if dice.chance(0.08) else "coil", 3, 6)
        fold.run("loose", 0, 5)
        if LENGTHS[0] + 4 <= len(fold.sites) <= LENGTHS[1] - 4:
            return fold.sites


@functools.cache
def emission(kind: str, tilt: float) -> tuple[int, ...]:
    """Return each residue's weight at a site: background, propensity, and hydropathy towards the core."""
    column = {"helix": 1, "strand": 2, "coil": 3, "loose": 3}.get(kind)
    pull = {"membrane": 0.24, "loose": -0.1}.get(kind, 0.17 * tilt)
    weights = []
    for row in RESIDUES.values():
        propensity = row[column] if column else 1.0  # a membrane span is drawn by hydropathy alone
        weights.append(round(1000 * row[0] * propensity * math.exp(pull * row[4])))
    return tuple(weights)


def affinity(one: str, other: str) -> int:
    """Return how well two paired strand residues go together, from 1 (badly) to 8 (a salt bridge)."""
    classes = {CLASS_OF[one], CLASS_OF[other]}
    if classes == {"+", "-"}:
        return 8
    return 4 if len(classes) == 1 and not classes & {"+", "-"} else 1


def draw_residue(dice: Dice, site: Site, residues: dict[int, str]) -> str:
    """Draw the residue of a site, given its mate's where it has one."""
    weights = emission(site.kind, site.tilt)
    if site.mate is not None:
        mate = residues[site.mate]
        weights = tuple(w * affinity(x, mate) for w, x in zip(weights, LETTERS, strict=True))
    return dice.weighted(LETTERS, weights)


def make_founder(dice: Dice, membrane: bool) -> Protein:
    """Make a protein from nothing: a family's consensus, or one that belongs to no family."""
    protein = Protein(make_fold(dice, membrane), {})
    for site in protein.sites:
        protein.residues[site.key] = draw_residue(dice, site, protein.residues)
    return protein


def make_member(dice: Dice, founder: Protein) -> Protein:
    """Make a family member: substitutions anywhere, paired ones together; indels in coil only."""
    share = dice.between(30, 45) / 100
    sites: list[Site] = []
    for site in founder.sites:
        soft = STATE[site.kind] == "C"
        if not (soft and dice.chance(0.05)):
            sites.append(site)
        if soft and dice.chance(0.05):
            sites.append(Site(-1 - len(sites), site.kind))
    residues = dict(founder.residues)
    redrawn: set[int | None] = set()
    for site in sites:
        # A mate follows its partner: that is what makes pairs show as columns that vary together.
        if site.key < 0 or site.mate in redrawn or (site.mate is None and dice.chance(share)):
            redrawn.add(site.key)
            residues[site.key] = draw_residue(dice, site, residues)
    return Protein(sites, residues)


class Source:
    """Draws proteins of one set of families, never the same sequence twice."""

    def __init__(self, dice: Dice) -> None:
        """Make the families; two in five are of membrane proteins."""
        self._founders = [make_founder(dice, membrane=n % 5 < 2) for n in range(FAMILIES)]
        self._seen: set[str] = set()

    def draw(self, dice: Dice) -> Protein:
        """Draw a family member, or now and then a protein with no family."""
        while True:
            if dice.chance(FAMILY_SHARE):
                protein = make_member(dice, dice.pick(self._founders))
            else:
                protein = make_founder(dice, dice.chance(0.4))
            sequence = protein.sequence
            if LENGTHS[0] <= len(sequence) <= LENGTHS[1] and sequence not in self._seen:
                self._seen.add(sequence)
                return protein


def exposure(dice: Dice, protein: Protein) -> list[float | None]:
    """Return how exposed each residue is (0 to 1), by its place in the fold; None where unresolved."""
    base = {"helix": (0.45, 0.28), "strand": (0.38, 0.22), "coil": (0.64, 0.0), "membrane": (0.2, 0.0)}
    values: list[float | None] = []
    for site in protein.sites:
        if site.kind == "loose":
            values.append(None)
            continue
        middle, swing = base[site.kind]
        value = middle - swing * site.tilt - 0.012 * HYDROPATHY[protein.residues[site.key]]
        values.append(round(min(1.0, max(0.0, value + 0.05 * dice.normal())), 2))
    return values


def stability(dice: Dice, protein: Protein) -> float:
    """Return a made-up stability: helix, well-paired strands, helices with one wet side, length."""
    sites, residues = protein.sites, protein.residues
    helix = sum(STATE[site.kind] == "H" for site in sites) / len(sites)
    moments = [HYDROPATHY[residues[s.key]] * s.tilt for s in sites if s.kind == "helix"]
    pairs = [affinity(residues[s.key], residues[s.mate]) - 3 for s in sites if s.mate is not None]
    # Few sites make a poor mean, so short stretches are drawn towards the middle.
    moment = math.fsum(moments) / max(8, len(moments))
    pairing = sum(pairs) / max(8, len(pairs))
    terms = (4.0 * (helix - 0.46), 0.8 * (moment - 0.6), 0.7 * pairing, 0.012 * (len(sites) - 80))
    return round(math.fsum(terms) + 0.3 * dice.normal(), 3)


def protein_row(dice: Dice, protein: Protein) -> dict[str, str]:
    """Return a labelled protein as one row, all tasks side by side."""
    kinds = [site.kind for site in protein.sites]
    return {
        "sequence": protein.sequence,
        "3state": "".join(STATE[kind] for kind in kinds),
        "resolved": "".join("0" if kind == "loose" else "1" for kind in kinds),
        "exposure": json.dumps(exposure(dice, protein), separators=(",", ":")),
        "location": "membrane" if "membrane" in kinds else "soluble",
        "stability": str(stability(dice, protein)),
    }
