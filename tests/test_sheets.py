"""Sheets of query | neighbors | samples: what is where, in pixels."""

import numpy as np
import torch

from retrodiff.pictures import Line, Section, draw_sheet


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
