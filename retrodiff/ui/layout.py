"""The page in Gradio: what stands where, and which part asks the studio what."""

import base64
import binascii
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from retrodiff.diffusion.sampler import SAMPLERS
from retrodiff.text import printable
from retrodiff.ui.cards import (
    Thumbnails,
    data_uri,
    message_html,
    neighbors_html,
    samples_html,
)
from retrodiff.ui.provenance import credited_files
from retrodiff.ui.question import Question, read_shares
from retrodiff.ui.studio import Studio

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SCRIPT, STYLE = FOLDER / "page.js", FOLDER / "page.css"

MODES = {
    "text+neighbors": "prompt and neighbors",
    "neighbors": "neighbors only",
    "text": "prompt only",
    "unconditional": "random rows, no prompt",
}
"""What the page calls the modes."""

LARGEST_K = 16
"""Of the slider."""

FAILED = "The page failed to answer; the terminal that runs it says why."


@dataclass(frozen=True)
class Marks:
    """Rows that a visitor has pinned or left out.

    Args:
        pinned: always taken.
        dropped: never taken.
        of: databases, shares and filter that the numbers belong to; with others they are void.
    """

    pinned: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    of: tuple[Any, ...] = ()

    def marked(self, act: str, row: int) -> "Marks":
        """After a button: a row is pinned or let go (``pin``), left out (``drop``), or all back."""
        if act == "back":
            return replace(self, dropped=())
        pinned = tuple(other for other in self.pinned if other != row)
        if act == "pin":
            return replace(self, pinned=pinned if row in self.pinned else (*self.pinned, row))
        return replace(self, pinned=pinned, dropped=(*self.dropped, row))


class Page:
    """The callbacks of the page; values in, values out, and errors as one line.

    Args:
        studio: does the work.
    """

    def __init__(self, studio: Studio):
        self.studio, self.thumbnails = studio, Thumbnails()

    def question(self, values: Sequence[Any], marks: Marks) -> Question:
        """What the parts of the page say, in the order of `build`."""
        (prompt, picture, names, shares, where, mode, k, guidance, steps, sampler, seed, n) = values
        if seed is None or n is None:
            raise ValueError("seed and number of samples must be numbers")
        names = tuple(names or ())
        question = Question(
            prompt=prompt or "",
            picture=picture,
            names=names,
            shares=read_shares(shares or ""),
            where=where or "",
            mode=mode,
            k=None if k is None else int(k),
            guidance=guidance,
            sampler=sampler or None,
            steps=None if steps is None else int(steps),
            seed=int(seed),
            n=int(n),
        )
        if marks.of != _database(question):
            return question
        return replace(question, pinned=marks.pinned, dropped=marks.dropped)

    def search(self, marks: Marks, compare: bool, other: Sequence[str], where: str, *values: Any):
        """Neighbors of both sides, the message, and the marks that are still valid."""
        try:
            question = self.question(values, marks)
            marks = Marks(question.pinned, question.dropped, _database(question))
            first = self._neighbors(question, _title("Neighbors", question, compare))
            second = ""
            if compare:
                beside = _beside(question, other, where)
                second = self._neighbors(beside, _title("Neighbors", beside, compare), marks=False)
            return first, second, message_html(), marks
        except Exception as error:
            return _kept(), _kept(), message_html(_line(error), error=True), marks

    def sample(
        self, marks: Marks, compare: bool, other: Sequence[str], where: str, *values: Any
    ) -> Iterator[tuple[Any, Any, Any]]:
        """Samples of both sides as they form, and the message."""
        try:
            question = self.question(values, marks)
            asked = [question, _beside(question, other, where)] if compare else [question]
            shown: list[Any] = ["", ""]
            yield *shown, message_html("Sampling …", busy=True)
            for side, one in enumerate(asked):
                title = _title("Samples", one, compare)
                for shown[side] in self._samples(one, title):
                    yield *shown, message_html("Sampling …", busy=True)
            yield *shown, message_html(self._done(question))
        except Exception as error:
            yield _kept(), _kept(), message_html(_line(error), error=True)

    def mark(self, event: Any, marks: Marks) -> Marks:
        """The marks after a button of a card was pressed."""
        act, row = str(event.get("act")), event.get("row")
        if act not in ("pin", "drop", "back") or not isinstance(row, int):
            return marks
        return marks.marked(act, row)

    def picture(self, event: Any) -> tuple[Any, Any, str]:
        """A picture that was sent: its embedding, how it is shown, the message."""
        try:
            if (problem := event.get("problem")) is not None:
                raise ValueError(f"{problem!s:.200}")
            data = str(event.get("data") or "")
            if not data:
                return None, drop_html(), message_html()
            try:
                raw = base64.b64decode(data.partition(",")[2], validate=True)
            except (binascii.Error, ValueError):
                raise ValueError("the picture did not arrive whole: send it again") from None
            embedding, small = self.studio.picture(raw)
            return embedding, drop_html(data_uri(small)), message_html()
        except Exception as error:
            return None, drop_html(), message_html(_line(error), error=True)

    def _neighbors(self, question: Question, title: str, *, marks: bool = True) -> str:
        found = self.studio.neighbors(question)
        return neighbors_html(
            found,
            self.thumbnails,
            pinned=question.pinned,
            dropped=question.dropped,
            title=title,
            marks=marks,
        )

    def _samples(self, question: Question, title: str) -> Iterator[str]:
        asked = "a picture" if question.picture is not None else question.prompt.strip()
        if question.mode == "unconditional":
            asked = ""
        made_by = {
            "name": f"retrodiff, {self.studio.name}",
            "databases": list(question.names),
            **({"shares": list(question.shares)} if question.shares else {}),
            **({"where": question.where} if question.where else {}),
            **({"pinned": list(question.pinned)} if question.pinned else {}),
            **({"dropped": list(question.dropped)} if question.dropped else {}),
        }
        for forming in self.studio.samples(question):
            files, database = (), None
            if forming.done is not None:
                files = credited_files(forming.done, asked, made_by)
                database: Any = forming.done.database
            yield samples_html(forming, title, self.thumbnails, files, database)

    def _done(self, question: Question) -> str:
        paints = self.studio.attributed and question.mode != "text"
        return "" if paints else "Done."


def build(studio: Studio, examples: Sequence[str] = (), about: str = "") -> Any:
    """The page as Gradio blocks; see `retrodiff.ui.shown` for how it is served.

    Args:
        studio: does the work.
        examples: prompts to click.
        about: a sentence below the name.
    """
    import gradio as gr

    page, model, limits = Page(studio), studio.model, studio.limits
    shelves = studio.shelves
    choices = [(shelf.label, name) for name, shelf in shelves.shelves.items()]
    first = list(shelves.first) or [choices[0][1]]
    others = [name for name in shelves.shelves if name not in first[:1]][:1] or first
    columns = ", ".join(studio.shelves.open(first).columns)
    modes = [(MODES.get(mode, mode), mode) for mode in studio.modes]
    with gr.Blocks(title=f"retrodiff: {studio.name}", analytics_enabled=False) as blocks:
        gr.HTML(head_html(about))
        with gr.Row(elem_classes="rd-ask", equal_height=True):
            prompt = gr.Textbox(
                value=examples[0] if examples else "",
                label="Prompt",
                placeholder="What should be drawn?",
                max_lines=1,
                scale=6,
                min_width=220,
                autofocus=True,
                interactive=studio.reads_text,
                elem_id="rd-prompt",
            )
            sample = gr.Button(
                "Sample", variant="primary", size="lg", scale=1, min_width=140, elem_id="rd-sample"
            )
            again = gr.Button("Next seed", size="lg", scale=1, min_width=90, elem_id="rd-again")
            stop = gr.Button("Stop", size="lg", scale=1, min_width=90, elem_id="rd-stop")
        with gr.Row(elem_classes="rd-ways"):
            chips = gr.HTML(chips_html(examples), js_on_load=_js("chips"), scale=5, min_width=220)
            drop = gr.HTML(
                drop_html(), js_on_load=_js("drop"), limit=limits.upload, scale=2, min_width=220
            )
        with gr.Row(elem_classes="rd-shelves"):
            names = gr.CheckboxGroup(
                choices, value=first, label="Databases", elem_id="rd-names", scale=5, min_width=260
            )
            compare = gr.Checkbox(
                label="Compare with others",
                container=False,
                elem_id="rd-compare",
                scale=2,
                min_width=200,
            )
        with gr.Row(visible=False, elem_classes="rd-shelves") as beside:
            other = gr.CheckboxGroup(
                choices, value=others, label="Compared with", elem_id="rd-other", scale=3
            )
            other_where = gr.Textbox(
                label="Filter for these", max_lines=1, elem_id="rd-other-where", scale=2
            )
        message = gr.HTML(message_html(), elem_id="rd-message")
        with gr.Row(elem_classes="rd-sides"):
            near = gr.HTML(js_on_load=_js("cards"), elem_id="rd-near", min_width=280)
            near_other = gr.HTML(elem_id="rd-near-other", min_width=280, visible=False)
        with gr.Row(elem_classes="rd-sides"):
            made = gr.HTML(empty_html(), elem_id="rd-made", min_width=280)
            made_other = gr.HTML(elem_id="rd-made-other", min_width=280, visible=False)
        with gr.Accordion("Settings", open=False, elem_id="rd-settings"):
            with gr.Row():
                where = gr.Textbox(
                    label="Filter",
                    info=f"Only rows that meet a condition on {columns}; Enter applies it",
                    placeholder="license == 'MIT'",
                    max_lines=1,
                    elem_id="rd-where",
                )
                shares = gr.Textbox(
                    label="Shares",
                    info="How many neighbors each database gives; empty: the nearest of all",
                    placeholder="3, 1",
                    max_lines=1,
                )
            mode = gr.Radio(modes, value=studio.modes[0], label="What guides the picture")
            with gr.Row():
                most = min(limits.k, LARGEST_K)
                k = gr.Slider(0, most, model.k, step=1, label="k: prompt and neighbors together")
                n = gr.Slider(1, limits.samples, 4, step=1, label="Samples")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="rd-seed")
            with gr.Row():
                guidance = gr.Slider(0, 10, _scale(model), step=0.1, label="Guidance scale")
                steps = gr.Slider(1, min(limits.steps, 100), model.steps, step=1, label="Steps")
                sampler = gr.Dropdown(
                    [("the model's", ""), *[(name, name) for name in SAMPLERS]],
                    value="",
                    label="Sampler",
                )
        picture, marks = gr.State(None), gr.State(Marks())
        values = [
            prompt, picture, names, shares, where, mode, k, guidance, steps, sampler, seed, n,
        ]  # fmt: skip
        inputs = [marks, compare, other, other_where, *values]
        found = [near, near_other, message, marks]
        direct: dict[str, Any] = {
            "queue": False,
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        sampling: dict[str, Any] = {
            "inputs": inputs,
            "outputs": [made, made_other, message],
            "show_progress": "hidden",
            "concurrency_id": "sample",
            "concurrency_limit": 1,
            "api_visibility": "private",
            "scroll_to_output": False,
        }
        search: dict[str, Any] = {"fn": page.search, "inputs": inputs, "outputs": found, **direct}

        def on_mark(marks: Marks, event: gr.EventData) -> Marks:
            return page.mark(event._data, marks)

        def on_picture(event: gr.EventData) -> tuple[Any, Any, str]:
            return page.picture(event._data)

        def after_picture(told: str, *given: Any) -> tuple[Any, Any, Any, Marks]:
            near, near_other, message, marks = page.search(*given)
            refused = 'role="alert"' in told  # why stays to be read
            return near, near_other, told if refused else message, marks

        def on_chip(event: gr.EventData) -> tuple[str, None, str]:
            return str(event._data.get("prompt", ""))[: limits.text], None, drop_html()

        def on_compare(compared: bool, chosen: list[str]) -> list[Any]:
            rest = [name for name in shelves.shelves if name not in (chosen or [])]
            visible = [gr.update(visible=compared) for _ in range(3)]
            return [*visible, rest[:1] or chosen]

        def next_seed(seed: Any, n: Any) -> int:
            return int(seed or 0) + int(n or 1)

        blocks.load(**search)
        # One event for all parts, so that an older search never overwrites a newer one: what is
        # changed while a search runs is searched for after it. Not ``input``, which Gradio does
        # not tell of text that was pasted. Conditions are read when they are whole, not with every
        # letter: half of one is an error.
        asking: list[Any] = [part.change for part in (prompt, names, mode, k, seed, other)]
        for part in (shares, where, other_where):
            asking += [part.submit, part.blur]
        gr.on(asking, **search, trigger_mode="always_last")
        compare.change(
            on_compare, [compare, names], [beside, near_other, made_other, other], **direct
        ).then(**search)
        near.select(on_mark, marks, marks, **direct).then(**search)
        drop.upload(on_picture, None, [picture, drop, message], **direct).success(
            after_picture, [message, *inputs], found, **direct
        )
        runs: list[Any] = [
            sample.click(page.sample, **sampling),
            prompt.submit(page.sample, **sampling),
            again.click(next_seed, [seed, n], seed, **direct).then(page.sample, **sampling),
            chips.select(on_chip, None, [prompt, picture, drop], **direct)
            .then(**search)
            .then(page.sample, **sampling),
        ]
        stop.click(lambda: message_html("Stopped."), None, message, cancels=runs, **direct)
    return blocks.queue(max_size=limits.requests, default_concurrency_limit=1)


def head_html(about: str) -> str:
    """Name and sentence."""
    said = about or "Type to search the database; press Sample to draw from what was found."
    return f'<header class="rd-title"><h1>retrodiff</h1><p>{printable(said)}</p></header>'


def chips_html(examples: Sequence[str]) -> str:
    """Prompts as buttons."""
    if not examples:
        return ""
    chips = "".join(
        f'<button type="button" class="rd-chip" data-prompt="{one}">{one}</button>'
        for one in examples
    )
    return f'<div class="rd-chips"><span>Try</span>{chips}</div>'


def drop_html(shown: str = "") -> str:
    """The place for a picture, with the one that is asked with."""
    if shown:
        return (
            f'<div class="rd-drop full"><img src="{shown}" alt="The picture that is asked with">'
            '<button type="button" data-act="remove">Remove the picture</button></div>'
        )
    return (
        '<label class="rd-drop"><input type="file" accept="image/*">'
        "<span>Or ask with a picture: "
        '<span class="rd-mouse">drop it here or </span><u>choose one</u></span></label>'
    )


def empty_html() -> str:
    """What stands where samples will be."""
    return '<p class="rd-empty">Press <b>Sample</b> or Enter, and pictures form here.</p>'


def _js(part: str) -> str:
    return f"window.retrodiff.{part}(element, trigger, props)"


def _database(question: Question) -> tuple[Any, ...]:
    return question.names, question.shares, question.where.strip()


def _beside(question: Question, names: Sequence[str], where: str) -> Question:
    """The same question to other databases; rows that were marked are not theirs."""
    chosen = tuple(names or ())
    return replace(question, names=chosen, shares=None, where=where or "", pinned=(), dropped=())


def _title(what: str, question: Question, compare: bool) -> str:
    if not compare:
        asked = what == "Samples" and question.mode != "unconditional" and question.picture is None
        return f"{what} of “{question.prompt.strip()}”" if asked else what
    where = f" where {question.where.strip()}" if question.where.strip() else ""
    return f"{what}: {', '.join(question.names)}{where}"


def _scale(model: Any) -> float:
    return float(getattr(model.guidance, "scale", 2.0))


def _line(error: Exception) -> str:
    """An error as a line for the visitor; what is our own fault goes to the log."""
    if isinstance(error, ValueError | OSError | ArithmeticError | IndexError):
        said = " ".join(str(error).split())
        return (said[0].upper() + said[1:]) if said else type(error).__name__
    log.error("the page failed", exc_info=error)
    return FAILED


def _kept() -> Any:
    """Leaves a part of the page as it is."""
    import gradio as gr

    return gr.skip()
