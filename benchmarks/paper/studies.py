"""The nine studies: what the paper says, which points test it, and what is drawn.

A study is a configuration alone. `run.py` trains what its points need, measures them, writes a csv,
and draws its panels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from points import REAL, REAL_PICTURES, ROUND_TRIP, Point

FID = ("fid", "Fréchet distance (lower is better)")
PRECISION = ("precision", "precision (higher is better)")
RECALL = ("recall", "recall (higher is better)")

QUALITY = (("fid", "FID"), ("precision", "precision"), ("recall", "recall"))
COPYING = (
    ("similarity_neighbors", "excess cosine to own neighbors"),
    ("near_neighbors", "near-duplicates of own neighbors"),
    ("near_database", "of D"),
    ("near_trained", "of X"),
    ("near_trained_null", "of X, held-out pictures"),
)


@dataclass(frozen=True)
class Line:
    """Points that are joined, or bars of one color.

    Args:
        label: in the legend.
        at: values on the x axis, or names of bars; None: a column of the numbers says.
        points: at each of them, one for each seed.
    """

    label: str
    at: tuple[float | str | None, ...]
    points: tuple[tuple[Point, ...], ...]


@dataclass(frozen=True)
class Panel:
    """One plot.

    Args:
        y: column, and what the axis says.
        x: what the axis says.
        column: of the numbers, for x; empty: the lines' own values.
        lines: labels of the lines that are drawn; empty: all.
        logarithmic: x axis.
        bars: in place of lines.
        divided: x is divided by this.
    """

    y: tuple[str, str]
    x: str
    column: str = ""
    lines: tuple[str, ...] = ()
    logarithmic: bool = False
    bars: bool = False
    divided: float = 1.0


@dataclass(frozen=True)
class Study:
    """A claim of the paper, and what tests it here.

    Args:
        letter: a to i.
        name: of its files.
        title: of the figure.
        claim: of the paper, in our words.
        lines: what is measured.
        panels: what is drawn.
        anchors: points of real pictures, drawn as dotted lines.
        columns: of the page's table: of the csv, and what they are called.
        digits: measured with the demo's digits in place of photographs.
    """

    letter: str
    name: str
    title: str
    claim: str
    lines: tuple[Line, ...]
    panels: tuple[Panel, ...]
    anchors: tuple[Point, ...] = ()
    columns: tuple[tuple[str, str], ...] = QUALITY
    digits: bool = False

    def points(self) -> list[Point]:
        """All of them, each once."""
        own = [point for line in self.lines for seeds in line.points for point in seeds]
        return list(dict.fromkeys([*own, *self.anchors]))

    def trainings(self) -> list[str]:
        """Names of the trainings that they need."""
        names = dict.fromkeys(point.training for point in self.points())
        return [name for name in names if name not in REAL_PICTURES]


def line(label: str, points: dict[float | str, Point | Sequence[Point]]) -> Line:
    """A line by its values on the x axis."""
    seeds = tuple((p,) if isinstance(p, Point) else tuple(p) for p in points.values())
    return Line(label, tuple(points), seeds)


def parts(label: str, *trainings: str) -> Line:
    """A training at a fourth, a half and all of its steps; several are seeds of one."""
    seeds = tuple(tuple(Point(name, part) for name in trainings) for part in range(3))
    return Line(label, (None, None, None), seeds)


RDM = Point("rdm")
LDM = Point("ldm")
SEEDS = (RDM, Point("rdm seed 1"))
LDM_SEEDS = (LDM, Point("ldm seed 1"))
HALF = (Point("rdm half"), Point("rdm half seed 1"))
QUARTER = (Point("rdm quarter"), Point("rdm quarter seed 1"))
ANCHORS = (Point(REAL), Point(ROUND_TRIP))


def of_sizes(label: str, database: str) -> Line:
    """RDM of three widths with a database of one size, against their parameters."""
    widths = (QUARTER, HALF, SEEDS)
    chosen = tuple(tuple(replace(p, database=database) for p in width) for width in widths)
    return Line(label, (None, None, None), chosen)


COUNTS = (1, 2, 4, 8, 16)
SCALES_OF_GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0)
PROPOSALS = ("uniform", "p_D", "top 0.5", "top 0.1", "top 0.01")
COMPLEXITY = {2: "two", 6: "animals", 10: "all"}


def own(training: str, group: str) -> Point:
    """A model of a group of classes, compared with held-out pictures of that group."""
    name = training if group == "all" else f"{training} {group}"
    reference = "everything" if group == "all" else group
    return Point(name, reference=reference)


STUDIES = (
    Study(
        "a",
        "a_parameters",
        "(a) Retrieval against parameters, database size and time of training",
        "With retrieval a network of a fraction of the parameters is better than one without, at "
        "equal training; it gets better with the size of D.",
        (
            parts("RDM", "rdm", "rdm seed 1"),
            parts("LDM", "ldm", "ldm seed 1"),
            parts("RDM, half width", "rdm half", "rdm half seed 1"),
            parts("RDM, quarter", "rdm quarter", "rdm quarter seed 1"),
            of_sizes("RDM, D of 20k", "trained with"),
            of_sizes("RDM, D of 5k", "5k"),
            of_sizes("RDM, D of 1k", "1k"),
            Line("LDM, no D", (None,), (LDM_SEEDS,)),
        ),
        (
            Panel(
                FID,
                "training (minutes of one core)",
                "seconds",
                ("RDM", "LDM", "RDM, half width", "RDM, quarter"),
                divided=60,
            ),
            Panel(
                FID,
                "parameters (millions)",
                "parameters",
                ("RDM, D of 20k", "RDM, D of 5k", "RDM, D of 1k", "LDM, no D"),
                divided=1e6,
            ),
            Panel(
                RECALL,
                "parameters (millions)",
                "parameters",
                ("RDM, D of 20k", "RDM, D of 5k", "RDM, D of 1k", "LDM, no D"),
                divided=1e6,
            ),
        ),
        ANCHORS,
    ),
    Study(
        "e",
        "e_proposals",
        "(e) Where pseudo-queries come from, and guidance",
        "Queries drawn uniformly from D give worse pictures than p_D; a small m trades recall for "
        "precision; so does a larger guidance scale s.",
        (
            line("proposal", {name: replace(RDM, proposal=name, copies=True)
                              for name in PROPOSALS}),
            line("guidance, p_D", {s: replace(RDM, guidance=s, copies=True)
                                   for s in SCALES_OF_GUIDANCE}),
            line("guidance, top 0.1", {s: replace(RDM, guidance=s, proposal="top 0.1")
                                       for s in (1.0, 2.0, 5.0)}),
        ),
        (
            Panel(FID, "pseudo-queries from", "", ("proposal",), bars=True),
            Panel(PRECISION, "pseudo-queries from", "", ("proposal",), bars=True),
            Panel(RECALL, "pseudo-queries from", "", ("proposal",), bars=True),
            Panel(FID, "guidance scale s", "", ("guidance, p_D", "guidance, top 0.1")),
            Panel(PRECISION, "guidance scale s", "", ("guidance, p_D", "guidance, top 0.1")),
            Panel(RECALL, "guidance scale s", "", ("guidance, p_D", "guidance, top 0.1")),
        ),
        ANCHORS,
    ),
    Study(
        "g",
        "g_databases",
        "(g) The database: swapped, smaller, of another domain",
        "The database can be exchanged after training, and decides what is generated; a network "
        "that was trained on one domain makes pictures of another.",
        (
            line("all classes in X", {
                "D": replace(RDM, classes="vehicles"),
                "D's animals": replace(RDM, database="animals", classes="vehicles"),
                "D's vehicles": replace(RDM, database="vehicles", classes="vehicles"),
            }),
            line("animals alone in X", {
                "D": Point("rdm animals", classes="vehicles"),
                "D's animals": Point("rdm animals", database="animals", classes="vehicles"),
                "D's vehicles": Point("rdm animals", database="vehicles", classes="vehicles"),
            }),
            line("fit: in-domain D", {
                "in-domain": Point("rdm animals", database="animals", reference="animals"),
                "of vehicles": Point("rdm animals from vehicles", reference="animals"),
                "swapped in": Point("rdm animals from vehicles", database="animals",
                                    reference="animals"),
                "no D (LDM)": Point("ldm animals", reference="animals"),
            }),
        ),
        (
            Panel(("share_judged", "samples judged a vehicle (share)"), "database asked", "",
                  ("all classes in X", "animals alone in X"), bars=True),
            Panel(FID, "X of animals, D in training", "", ("fit: in-domain D",), bars=True),
            Panel(RECALL, "X of animals, D in training", "", ("fit: in-domain D",), bars=True),
        ),
        columns=(*QUALITY, ("share_judged", "judged a vehicle")),
    ),
    Study(
        "i",
        "i_copying",
        "(i) Copying against k, m, s and self-exclusion",
        "The paper reports no copying. What we ask: do samples come nearer to training pictures, "
        "to D or to their own neighbors than held-out photographs do?",
        (
            line("k", {k: replace(RDM, k=k, copies=True) for k in COUNTS}),
            line("m", {1.0: replace(RDM, proposal="top 1", copies=True),
                       0.5: replace(RDM, proposal="top 0.5", copies=True),
                       0.1: replace(RDM, proposal="top 0.1", copies=True),
                       0.01: replace(RDM, proposal="top 0.01", copies=True)}),
            line("s", {s: replace(RDM, guidance=s, copies=True) for s in SCALES_OF_GUIDANCE}),
            line("D and X", {
                "apart": replace(RDM, copies=True),
                "same": Point("rdm own", copies=True),
                "same, own row excluded": Point("rdm own excluded", copies=True),
                "no D (LDM)": replace(LDM, copies=True),
                "X itself, round trip": Point(ROUND_TRIP, copies=True),
            }),
        ),
        (
            Panel(("similarity_neighbors", "excess cosine to own neighbors"),
                  "k at test (trained with 4)", "", ("k",), logarithmic=True),
            Panel(("similarity_neighbors", "excess cosine to own neighbors"),
                  "m, share of p_D's support", "", ("m",), logarithmic=True),
            Panel(("similarity_neighbors", "excess cosine to own neighbors"),
                  "guidance scale s", "", ("s",)),
            Panel(("near_trained", "near-duplicates of X (share)"), "D and X", "",
                  ("D and X",), bars=True),
        ),
        columns=COPYING,
    ),
    Study(
        "b",
        "b_neighbors",
        "(b) How many neighbors: k in training and at test",
        "More neighbors in training: recall rises to about 8 and precision falls, by one account; "
        "all scores get worse with k, by another.",
        (
            line("k in training = k at test", {
                k: Point(f"rdm k={k}") if k != 4 else SEEDS for k in COUNTS}),
            line("k=4 in training", {k: replace(RDM, k=k, copies=True) for k in COUNTS}),
        ),
        tuple(Panel(y, "k at test", logarithmic=True) for y in (FID, PRECISION, RECALL)),
        ANCHORS,
    ),
    Study(
        "d",
        "d_complexity",
        "(d) How complex the data are: two classes, six of animals, all ten",
        "From dogs to mammals to animals, precision and FID get worse for both; recall improves "
        "for the semi-parametric model alone.",
        (
            line("RDM", {n: own("rdm", g) for n, g in COMPLEXITY.items()}),
            line("LDM", {n: own("ldm", g) for n, g in COMPLEXITY.items()}),
        ),
        tuple(Panel(y, "classes in X") for y in (FID, PRECISION, RECALL)),
    ),
    Study(
        "c",
        "c_encoders",
        "(c) The encoder of the neighbors",
        "Neighbors in CLIP's space are better than in that of VQ-GAN features.",
        (
            line("RDM", {
                "EfficientNet Lite0": SEEDS,
                "VQ-GAN latents": Point("rdm vqgan phi"),
                "Lite0, random weights": Point("rdm random phi"),
                "no D (LDM)": LDM_SEEDS,
            }),
        ),
        tuple(Panel(y, "encoder φ", bars=True) for y in (FID, PRECISION, RECALL)),
        ANCHORS,
    ),
    Study(
        "h",
        "h_patches",
        "(h) Size of the patches in D",
        "For pictures of 256 pixels, patches of 256 are better than those of 128 and 64.",
        (
            line("RDM", {
                8: Point("rdm crops8"),
                16: Point("rdm crops16"),
                32: SEEDS,
            }),
        ),
        tuple(Panel(y, "side of D's patches (pixels; pictures have 32)")
              for y in (FID, PRECISION, RECALL)),
        ANCHORS,
    ),
    Study(
        "f",
        "f_text",
        "(f) Text alone, text and neighbors, neighbors alone",
        "Asked with text, the text's embedding alone is best, then text and k-1 neighbors, then k "
        "neighbors.",
        (),
        (),
        digits=True,
    ),
)  # fmt: skip
"""In the order in which they are worth their time."""
