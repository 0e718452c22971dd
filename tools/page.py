"""The page of `tools.app`, made with gradio: what is on it, and what happens on a click. `tools.session` does the work."""

import html
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from . import ROOT
from .session import BOXES, PROBLEMS, TILES, Reader, Session, words_of

EXAMPLES = {"A receipt": "receipt.png", "An invoice, 3 pages": "invoice.pdf"}
QUESTIONS = ("What is the total?", "Who is the seller?", "What is the date?")
FIELDS = "supplier, date, due date, total"
NO_DOCUMENT = "Choose a document first: an image or a PDF."
STYLE = """
.gradio-container { margin: 0 auto !important; max-width: 1240px !important; width: 100% !important; }
#head h1 { font-size: 1.5rem; font-weight: 600; margin: 0; }
#head p, .note { color: var(--body-text-color); font-size: .875rem; line-height: 1.45; margin: 0; opacity: .8;
    overflow-wrap: anywhere; }
.caution, .problem { border-left: 3px solid #b45309; font-size: .9375rem; line-height: 1.45; margin: .5rem 0 0;
    overflow-wrap: anywhere; padding: .25rem 0 .25rem .75rem; }
.problem { border-color: #b91c1c; margin: 0; }
[role=tab][aria-selected=true] { color: var(--body-text-color) !important; }
#page img { max-height: 72vh; object-fit: contain; }
#chat .message { overflow-wrap: anywhere; }
#chat .icon-button-wrapper { display: none; } /* gradio's clears the page and not the conversation */
#fields .cell-menu-button { display: none; }
#fields th * { font-size: .75rem; } /* in a narrow window their words stay whole */
#fields th .cell-wrap { padding: 8px 4px; }
#fields table, #fields .body-cell * { font-family: var(--font); }
"""
THEME = gr.themes.Default(
    primary_hue="slate",
    neutral_hue="slate",
    radius_size="sm",
    font=["system-ui", "sans-serif"],  # as texts: fonts of the machine, none from the network
    font_mono=["ui-monospace", "monospace"],
)

Updates = dict[Any, Any]  # what becomes of components of the page


def as_html(text: str, kind: str = "note") -> str:
    """Return a text as a paragraph, empty for none; `kind` is "note", "caution" or "problem"."""
    role = ' role="alert"' if kind == "problem" else ""
    return f'<p class="{kind}"{role}>{html.escape(text)}</p>' if text else ""


def problem_of(error: BaseException, path: str | Path) -> str:
    """Return an error about a document as a paragraph."""
    return as_html(words_of(error, path), "problem")


class DocumentPage:
    """The page for one model.

    Args:
        reader: that answers everybody who opens the page.
    """

    def __init__(self, reader: Reader):
        self.reader = reader
        with gr.Blocks(
            title="Ask a document", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
        ) as self.blocks:
            self.session = gr.State(None, delete_callback=lambda session: session and session.close())
            gr.HTML(f"<h1>Ask a document</h1><p>{html.escape(reader.describe())}</p>", elem_id="head", padding=False)
            with gr.Row():
                with gr.Column(min_width=300):
                    self._add_document()
                with gr.Column(min_width=300), gr.Tabs():
                    with gr.Tab("Ask"):
                        self._add_questions()
                    with gr.Tab("Fields"):
                        self._add_fields()
            self._idle = {element: gr.update(visible=True) for element in (self.ask, self.read)}
            self._idle |= {element: gr.update(visible=False) for element in (self.stop, self.stop_reading)}
            self._busy = {element: gr.update(visible=not change["visible"]) for element, change in self._idle.items()}
            self._connect_document()
            self._connect_questions()

    # --- what is on the page ---

    def _add_document(self) -> None:
        self.file = gr.File(label="An image or a PDF", height=130, elem_id="file")
        with gr.Row():
            self.examples = {name: gr.Button(label, size="sm", min_width=100) for label, name in EXAMPLES.items()}
        self.problem = gr.HTML(visible=False, elem_id="problem", padding=False)
        hidden = {"visible": False, "min_width": 110}
        with gr.Row():
            self.pages = gr.Textbox(label="Pages", placeholder="1-3,7", elem_id="pages", **hidden)
            self.password = gr.Textbox(label="Password", type="password", elem_id="password", **hidden)
            numbers = [*range(1, self.reader.max_num_tiles + 1)]
            self.tiles = gr.Dropdown(numbers, value=numbers[-1], label="Tiles, at most", elem_id="tiles", **hidden)
            self.index = gr.Dropdown([0], label="Page shown", elem_id="index", **hidden)
            self.view = gr.Radio([TILES], value=TILES, label="Show", elem_id="view", **hidden)
        self.costs = gr.HTML(elem_id="costs", padding=False)
        self.picture = gr.Image(
            show_label=False, interactive=False, visible=False, buttons=["fullscreen"], elem_id="page"
        )

    def _add_questions(self) -> None:
        self.chat = gr.Chatbot(
            show_label=False,
            height=400,
            render_markdown=False,  # an answer is shown as the model wrote it
            buttons=[],
            placeholder="Choose a document, then ask about it.",
            elem_id="chat",
        )
        self.note = gr.HTML(elem_id="note", padding=False)
        self.question = gr.Textbox(
            show_label=False, container=False, placeholder="A question", max_lines=4, elem_id="question"
        )
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary", min_width=80, elem_id="ask")
            self.stop = gr.Button("Stop", variant="stop", visible=False, min_width=80, elem_id="stop")
            self.again = gr.Button("Start again", min_width=80, elem_id="again")
        with gr.Row():
            self.suggestions = [gr.Button(text, size="sm", min_width=100) for text in QUESTIONS]

    def _add_fields(self) -> None:
        self.wanted = gr.Textbox(
            value=FIELDS,
            label="Fields",
            info="Names, separated by commas, or a JSON Schema",
            lines=3,
            max_lines=12,
            elem_id="wanted",
        )
        with gr.Row():
            self.read = gr.Button("Read fields", variant="primary", min_width=80, elem_id="read")
            self.stop_reading = gr.Button("Stop", variant="stop", visible=False, min_width=80, elem_id="stop-reading")
        self.field_note = gr.HTML(elem_id="field-note", padding=False)
        self.table = gr.Dataframe(
            headers=["Field", "Value", "Confidence", "Page"],
            datatype="str",
            interactive=False,
            wrap=True,
            visible=False,
            buttons=[],
            column_widths=["26%", "32%", "26%", "16%"],
            elem_id="fields",
        )
        self.download = gr.DownloadButton("Download JSON", visible=False, elem_id="download")

    # --- what happens ---

    def _connect_document(self) -> None:
        given = [self.session, self.file, self.pages, self.password, self.tiles]
        outputs = [*given, self.problem, *self._view_outputs, *self._conversation(), *self._idle]
        for trigger in (self.file.upload, self.file.clear):
            _on(trigger, self.open_new, [self.session, self.file, self.tiles], outputs)
        for trigger in (self.pages.submit, self.password.submit, self.tiles.input):
            _on(trigger, self.open, given, outputs)
        for name, button in self.examples.items():
            _on(button.click, self._opening_example(name), [self.session, self.tiles], outputs)
        for trigger in (self.index.input, self.view.input):
            _on(trigger, self.show, [self.session, self.index, self.view], self._view_outputs, show_progress="hidden")

    def _connect_questions(self) -> None:
        start = {"queue": False, "show_progress": "hidden"}
        # The generations of all tabs wait for each other here, so that "Stop" can also take one out of the queue.
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
        asked = [self.chat, self.question, self.note, *self._idle]
        generations = []
        triggers = [(self.ask.click, self.question), (self.question.submit, self.question)]
        for trigger, text in [*triggers, *((button.click, button) for button in self.suggestions)]:
            began = _on(trigger, self.begin_answer, [self.session, text, self.chat], asked, **start)
            outputs = [*asked, *self._view_outputs]
            generations.append(_on(began.then, self.answer, [self.session, self.chat], outputs, **one_at_a_time))
        began = _on(self.read.click, self.begin_reading, [self.session], [self.field_note, *self._idle], **start)
        outputs = [self.table, self.field_note, self.download, *self._idle, *self._view_outputs]
        reading = _on(began.then, self.read_fields, [self.session, self.wanted], outputs, **one_at_a_time)

        notes = [self.note, self.field_note, *self._idle]
        for button in (self.stop, self.stop_reading):
            _on(button.click, self.end, [self.session], notes, cancels=[*generations, reading], **start)
        outputs = [self.chat, self.note, *self._idle]
        _on(self.again.click, self.start_again, [self.session], outputs, cancels=[*generations, reading], **start)

    @property
    def _view_outputs(self) -> list[Any]:
        return [self.index, self.view, self.costs, self.picture]

    def _conversation(self) -> Updates:
        """Return what empties the right half of the page."""
        hidden = {element: gr.update(value=None, visible=False) for element in (self.table, self.download)}
        return {self.chat: [], self.note: "", self.field_note: "", **hidden}

    def _opening_example(self, name: str) -> Callable[[Session | None, int], Updates]:
        path = str(ROOT / "examples" / name)
        return lambda old, most: {**self.open_new(old, path, most), self.file: path}

    def open_new(self, old: Session | None, path: str | None, most: int) -> Updates:
        """Open a document that has just been chosen, or none."""
        return self.open(old, path, "", "", most)

    def open(self, old: Session | None, path: str | None, pages: str, password: str, most: int) -> Updates:
        """Open a document and show its first page, or say in words why that is not possible.

        Args:
            old: what was open until now.
            path: of the document; None if there is none.
            pages, password: as they were typed.
            most: tiles of a page.
        """
        if old is not None:
            old.close()
        updates = {**self._conversation(), **self._idle, self.problem: gr.update(visible=False)}
        hidden = {element: gr.update(visible=False) for element in (self.tiles, self.index, self.view)}
        closed = {self.session: None, self.costs: "", self.picture: gr.update(value=None, visible=False), **hidden}
        if path is None:
            fields = {element: gr.update(value="", visible=False) for element in (self.pages, self.password)}
            return {**updates, **closed, **fields}
        try:
            session = Session(self.reader, Path(path), pages.strip() or None, password or None, most)
            shown = self._shown(session, 0, TILES)
        except PROBLEMS as error:
            return {
                **updates,
                **closed,
                self.problem: gr.update(value=problem_of(error, path), visible=True),
                self.password: gr.update(value=password, visible="password" in str(error)),
                self.pages: gr.update(value=pages, visible=bool(pages)),
            }
        numbers = session.document.page_numbers
        return {
            **updates,
            **shown,
            self.session: session,
            self.pages: gr.update(
                value=session.page_range(),
                label=f"Pages, of {session.document.num_pages}",
                visible=session.document.num_pages > 1,
            ),
            self.password: gr.update(value=password, visible=bool(password)),
            self.tiles: gr.update(visible=self.reader.max_num_tiles > 1),
            self.index: gr.update(
                choices=[(str(number), index) for index, number in enumerate(numbers)],
                value=0,
                visible=len(numbers) > 1,
            ),
        }

    def show(self, session: Session | None, index: int, view: str) -> Updates:
        """Show another page, or the page with something else drawn over it."""
        return self._shown(session, index, view) if session else {self.costs: ""}

    def _shown(self, session: Session, index: int, view: str) -> Updates:
        views = session.views(index)
        view = view if view in views else TILES
        cautions = "".join(as_html(caution, "caution") for caution in session.cautions(index))
        return {
            self.picture: gr.update(value=session.picture(index, view), visible=True),
            self.costs: as_html(session.costs(index)) + cautions,
            self.view: gr.update(choices=views, value=view, visible=True),
        }

    def _boxes(self, session: Session) -> Updates:
        """Show the first page that the last answer has boxes of, if it has some."""
        index = session.first_page_with_boxes
        return {} if index is None else {self.index: index, **self._shown(session, index, BOXES)}

    def begin_answer(self, session: Session | None, text: str, turns: list[Any]) -> Updates:
        """Take a question, which `answer` then answers; not while another answer is awaited."""
        if session is None:
            return {self.note: as_html(NO_DOCUMENT, "problem")}
        if not text.strip():
            return {self.note: as_html("Write a question first.", "problem")}
        if session.is_busy:
            return {self.note: as_html("One question at a time: wait for the answer, or stop it.", "problem")}
        session.question = text.strip()
        turns = [*turns, {"role": "user", "content": session.question}]
        note = as_html("Waiting. One answer is generated at a time.")
        return {self.chat: turns, self.question: "", self.note: note, **self._busy}

    def answer(self, session: Session | None, turns: list[Any]) -> Iterator[Updates]:
        """Answer the question that is the last of the turns, as far as it has come."""
        if session is None or session.question is None:
            yield {}
            return
        question, session.question = session.question, None
        try:
            for reply in session.ask(question):
                answer = [{"role": "assistant", "content": reply.text}] if reply.text else []
                yield {self.chat: [*turns, *answer], self.note: as_html(reply.note or "Answering ...")}
            yield {**self._idle, **self._boxes(session)}
        except PROBLEMS as error:
            note = problem_of(error, session.path)
            yield {self.chat: turns[:-1], self.question: question, self.note: note, **self._idle}

    def begin_reading(self, session: Session | None) -> Updates:
        if session is None:
            return {self.field_note: as_html(NO_DOCUMENT, "problem")}
        if session.is_busy:
            return {self.field_note: as_html("An answer is being generated: wait for it, or stop it.", "problem")}
        session.wants_fields = True
        return {self.field_note: as_html("Reading the fields. One answer is generated at a time."), **self._busy}

    def read_fields(self, session: Session | None, wanted: str) -> Iterator[Updates]:
        """Read the fields and fill the table."""
        if session is None or not session.wants_fields:
            yield {}
            return
        session.wants_fields = False
        try:
            for found in session.extract(wanted):
                with tempfile.TemporaryDirectory() as folder:  # gradio copies the file before it goes on
                    path = Path(folder) / f"{session.path.stem}.fields.json"
                    path.write_text(json.dumps(found.json, ensure_ascii=False, indent=2), encoding="utf-8")
                    yield {
                        self.table: gr.update(value=found.rows, visible=True),
                        self.field_note: as_html(found.note, "problem" if found.json["error"] else "note"),
                        self.download: gr.update(value=str(path), visible=True),
                        **self._boxes(session),
                    }
            yield self._idle
        except PROBLEMS as error:
            hidden = {element: gr.update(visible=False) for element in (self.table, self.download)}
            yield {self.field_note: problem_of(error, session.path), **hidden, **self._idle}

    def end(self, session: Session | None) -> Updates:
        """End what is generated for this tab, or waits."""
        if session is not None:
            session.stop()
        note = as_html("Stopped. The conversation goes on without this answer.")
        return {self.note: note, self.field_note: as_html("Stopped."), **self._idle}

    def start_again(self, session: Session | None) -> Updates:
        """Forget the conversation, and keep the document."""
        if session is not None:
            session.stop()
            session.history = None
        return {self.chat: [], self.note: "", **self._idle}


def _on(listener: Callable[..., Any], function: Callable[..., Any], inputs: Any, outputs: Any, **options: Any) -> Any:
    """Call a function on an event; programs cannot call it, as it makes sense on the page alone."""
    return listener(function, inputs, outputs, api_visibility="private", **options)
