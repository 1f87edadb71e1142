"""Sheets of query | neighbors | samples: what is where, in pixels."""

import numpy as np
import torch

from retrodiff.pictures import Line, Section, draw_sheet
from retrodiff.training.curves import Curve, Panel, draw_curves


def gray(value, side=8):
    return torch.full((1, side, side), float(value))


def blocks(sheet, value):
    """Places (y, x) of the corners of squares of one gray."""
    found = (np.asarray(sheet.convert("L")) == value).astype(int)
    corner = found.copy()
    corner[1:] &= 1 - found[:-1]
    corner[:, 1:] &= 1 - found[:, :-1]
    return [tuple(place) for place in np.argwhere(corner)]


def test_a_picture_enlarges_without_smoothing():
    image = gray(-1)
    image[0, 0, 0] = 1.0
    sheet = draw_sheet([Section("", [Line(image, [], [])])], side=64)
    levels = {value for _, value in sheet.crop((6, 6, 70, 70)).convert("L").getcolors(10_000)}
    assert levels == {0, 255}


def test_query_neighbors_and_samples_stand_in_columns():
    near, made = [gray(-0.5), gray(-0.5)], [gray(0.5)] * 3
    lines = [Line(gray(-0.75), near, made), Line(gray(-0.75), near[:1], made)]
    sheet = draw_sheet([Section("", lines)], side=32)
    (queries, neighbors, samples) = (blocks(sheet, v) for v in (32, 64, 191))
    assert [x for _, x in queries] == [6, 6]
    assert [x for _, x in neighbors] == [50, 88, 50]
    assert len({x for _, x in samples}) == 3  # also where a line has fewer neighbors
    assert min(x for _, x in samples) > 88 + 32
    assert sheet.width >= max(x for _, x in samples) + 32
    assert [y for y, _ in queries] == sorted({y for y, _ in neighbors})


def test_long_texts_stay_in_their_columns():
    words = "a very long caption that nobody will read to its end " * 9
    line = Line("prompt " * 90, [gray(0)] * 2, [gray(0)], captions=[words, "x" * 300])
    sheet = np.asarray(draw_sheet([Section("Title " * 40, [line])], side=64).convert("L"))
    assert (sheet[:, -1] == 255).all()
    assert sheet.shape[0] < 400
    between = sheet[45:, 6 + 128 + 12 + 64 : 6 + 128 + 12 + 64 + 5]  # first and second caption
    assert (between == 255).all()


def test_nothing_asked_odd_shapes_and_bytes():
    wide = torch.zeros(3, 4, 64, dtype=torch.uint8)
    nan = torch.full((3, 8, 8), float("nan"))
    sheet = draw_sheet([Section("t", [Line(None, [wide], [nan], "note")]), Section("", [])])
    assert sheet.size[0] > 3 * 64


def test_curves_stand_where_their_numbers_are():
    """A falling line and a level one, in pixels; points that are not finite are left out."""
    falling = [(float(i), 2.0 - i / 100) for i in range(101)]
    level = [(0.0, 1.0), (50.0, float("nan")), (100.0, 1.0)]
    panel = Panel("t", [Curve("a", falling, "#ff0000"), Curve("b", level, "#0000ff", True)])
    picture = np.asarray(draw_curves([panel])).astype(int)
    inside = picture[:, :580]  # without the legend
    red = (inside[..., 0] - inside[..., 2] > 150).nonzero()
    blue = (inside[..., 2] - inside[..., 0] > 150).nonzero()
    first, last = red[0][red[1] < 75].mean(), red[0][red[1] > 570].mean()
    assert first < last - 200  # large values stand above small ones
    assert abs(blue[0].mean() - last) < 5  # both end at 1
    assert np.ptp(blue[0]) <= 8


def test_curves_of_nothing_and_of_one_point():
    assert draw_curves([Panel("t", [Curve("a", [], "#000000")])]).size[0] > 0
    one = draw_curves([Panel("t", [Curve("a", [(3.0, 0.0)], "#000000")], mark=3.0)])
    assert np.asarray(one).min() < 50
    wide = [(1.0, 1e-3), (2.0, 10.0)]  # logarithmic
    assert draw_curves([Panel("t", [Curve("a", wide, "#000000")], ends=(0, 10))]).size[1] > 0
