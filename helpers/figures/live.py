"""The live lab: train, compare, scale, save and load vectors from a panel, beside the main thread.
One job at a time: a model's hooks belong to whoever set them, so two jobs would steer each other.
"""

import html
import re
import threading
from collections import Counter
from dataclasses import replace

import ipywidgets as widgets
import torch

from .. import ledger, metrics
from ..residual import LayerSpan, check_radii
from ..steering import SteeringVectors
from ..studies import speaking
from ..training import METHODS, Stopped, random_vectors, train
from .canvas import block, number
from .explorer import PANEL, field, html_box, slider
from .render import COLUMNS, render_error, render_table, render_texts, render_tried, render_verdict

BUTTONS = (
    ("Train", "learn vectors at each R", "primary", "100px"),
    ("Stop", "stop, and keep what is finished", "warning", "100px"),
    ("Compare with random", "random vectors of the same norms", "", "180px"),
    ("Save", "write the chosen vector's set", "", "64px"),
    ("Load", "read a set and show what it does", "", "64px"),
)
WORDS = (
    "<b>changed</b>: a reader would say that it does something else than the unsteered answer. "
    "<b>fluent</b>: somebody who writes the language could have written it. "
    "An R is <b>in range</b> where more learned vectors than random ones are both."
)


def measured(span, prompt, sets, kind, max_new_tokens=24) -> list[dict]:
    """A row per vector of `sets`: what it does, what the model says, and how that is judged."""
    clean, _, fluent = speaking.baseline(span.lm, prompt, max_new_tokens)
    rows = torch.cat([vectors.tensor for vectors in sets])
    theta = SteeringVectors(rows, span.source_layer, span.site)
    said = speaking.measured(span, clean, theta, max_new_tokens)
    texts = [one["text"] for one in said]
    good = fluent([one["surprise"] for one in said], texts)
    other = metrics.is_changed(texts, clean, prompt, [one["distance"] for one in said])
    places = [(vectors.radius, i) for vectors in sets for i in range(len(vectors))]
    found = []
    for (radius, i), one, changed, is_fluent in zip(places, said, other, good):
        judged = {"changed": bool(changed), "fluent": bool(is_fluent)}
        found.append({"kind": kind, **one, "vector": i, "radius": radius, **judged})
    return found


def in_range(rows) -> list[float]:
    """The radii at which more learned than random vectors change the answer and stay fluent."""
    both = [row for row in rows if row["changed"] and row["fluent"]]
    count = Counter((row["kind"], row["radius"]) for row in both)
    compared = sorted({row["radius"] for row in rows if row["kind"] == "random"})
    return [r for r in compared if count["learned", r] > count["random", r]]


def parse_radii(text) -> list[float]:
    """ "4, 8, 16, 8" → [4.0, 8.0, 16.0], each once; ValueError for anything else."""
    try:
        radii = [float(part) for part in re.split(r"[,;\s]+", text.strip(" ,;"))]
    except ValueError:
        allowed = "write numbers above 0, such as 10 or 4, 8, 16."
        raise ValueError(f"R {text!r} is not a list of numbers: {allowed}") from None
    return list(dict.fromkeys(check_radii(radii)))


# -- the panel -------------------------------------------------------------------------------------
class LiveLab(widgets.VBox):
    """The live lab of a model; the arguments are what its fields open with. `fields`, `buttons`
    {name: widget}; `rows`, `sets` {(kind, R): SteeringVectors}; `wait()` for the job."""

    def __init__(
        self, lm, prompt, source, target, radii, n_vectors, steps=8, seed=0, max_new_tokens=24
    ):
        self.lm = lm
        self.max_new_tokens = max_new_tokens
        self.folder = ledger.build_folder() / "vectors"
        self.rows, self.sets = [], {}
        self.asked = self.span = None  # the prompt and layers that the rows belong to, their span
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.thread = self.running = None
        self.again = False  # the running job's slider has moved on
        self.fields = self._fields(prompt, source, target, radii, n_vectors, steps, seed)
        self.buttons = {}
        for name, tip, style, width in BUTTONS:
            look = {"button_style": style, "layout": {"width": width}}
            self.buttons[name] = widgets.Button(description=name, tooltip=tip, **look)
        self.bar = widgets.IntProgress(0, 0, 1, description="progress", layout={"width": "420px"})
        self.status, self.tried, self.table = map(html_box, ("44px", "188px", "152px"))
        self.texts, self.said = map(html_box, ("108px", "28px"))
        super().__init__(self._layout(), layout=PANEL)
        self._listen()
        self._busy(None)
        self.note("Press Train. Nothing is trained by typing or sliding.")

    def _fields(self, prompt, source, target, radii, n_vectors, steps, seed):
        last, number, choice = self.lm.n_layers - 1, widgets.IntText, widgets.Dropdown
        wide, short = ("310px", "190px"), ("220px", "110px")
        columns = [(label, name) for name, label in COLUMNS.items()]
        factors = [x / 2 for x in range(-6, 7)]
        none = [("(none yet)", "")]
        return {
            "prompt": field(widgets.Textarea, prompt, "prompt", "720px", "60px", rows=2),
            "radius": field(widgets.Text, radii, "R (norm of θ), one or several", "530px", "190px"),
            "source": field(number, source, f"source layer, 0 … {last - 1}", *wide),
            "target": field(number, target, f"target layer, 1 … {last}", *wide),
            "n_vectors": field(number, n_vectors, "vectors (number)", *wide),
            "method": field(choice, "power", "method", *short, options=METHODS),
            "steps": field(number, steps, "steps (number)", *short),
            "seed": field(number, seed, "seed (number)", *short),
            "sort by": field(choice, "radius", "sort by", "280px", "80px", options=columns),
            "largest first": widgets.Checkbox(False, description="largest first", indent=False),
            "pick": field(choice, "", "vector", "250px", "80px", options=none),
            "coeff": slider(factors, 1.0, "coefficient (times θ)", "370px", "140px"),
            "file": field(widgets.Text, "my_vectors", "file name", "220px", "80px"),
        }

    def _layout(self):
        there = {**self.fields, **self.buttons, "bar": self.bar}

        def row(*names, box=widgets.HBox):
            return box([there[name] for name in names])

        settings = [("n_vectors", "source", "target"), ("method", "steps", "seed")]
        columns = [row(*names, box=widgets.VBox) for names in settings]
        words = block(WORDS, "font-size:12.5px;line-height:1.35;padding-left:8px")
        left = [self.fields["radius"], widgets.HBox(columns), html_box("54px", words)]
        return [
            self.fields["prompt"],
            widgets.HBox([widgets.VBox(left, layout={"flex": "0 0 536px"}), self.tried]),
            row("Train", "Stop", "Compare with random", "bar"),
            self.status,
            row("sort by", "largest first"),
            self.table,
            row("pick", "coeff", "file", "Save", "Load"),
            self.said,
            self.texts,
        ]

    def _listen(self):
        jobs = {"Train": self._train, "Compare with random": self._control}
        jobs |= {"Save": self._save, "Load": self._load}
        for name, action in jobs.items():
            self.buttons[name].on_click(lambda _, action=action: self._start(action))
        self.buttons["Stop"].on_click(lambda _: self._stop())
        for name in ("sort by", "largest first"):
            self.fields[name].observe(lambda _: self._draw(), "value")
        for name in ("pick", "coeff"):
            self.fields[name].observe(self._moved, "value")

    def _moved(self, _):
        if self._value("pick"):
            self._start(self._scale)

    # -- jobs
    def _start(self, action):
        """Run `action` beside the main thread. Another is refused; a slider's last value waits."""
        with self.lock:
            if self.running:
                if action == self.running == self._scale:
                    self.again = True
                else:
                    self.note("One thing at a time: wait, or press Stop.")
                return
            self.stop.clear()
            self._busy(action)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        while True:
            try:
                self.running()
            except Stopped:
                self.note("Stopped before anything was finished; what was there before is kept.")
            except Exception as error:
                self.status.value = render_error(error)
            with self.lock:
                if not self.again:
                    return self._busy(None)
                self.again = False

    def wait(self, seconds=None) -> None:
        """Until the running job has ended, or for so many seconds."""
        if self.thread:
            self.thread.join(seconds)

    def _stop(self):
        self.stop.set()
        self.note("Stopping …")

    def _busy(self, action):
        self.running = action
        for name, button in self.buttons.items():
            button.disabled = bool(action) != (name == "Stop")
        for name in ("pick", "coeff"):  # a slider that goes dead under the hand loses the next key
            self.fields[name].disabled = action not in (None, self._scale) or not self.sets

    def note(self, text) -> None:
        """Say what is going on."""
        self.status.value = block(html.escape(text), "font-size:15px")

    # -- what the buttons do
    def _value(self, name):
        return self.fields[name].value

    def _open(self, source, target):
        """The span of the prompt as typed; results of another prompt or span are put away."""
        asked = (self._value("prompt").strip(), source, target)
        if asked != self.asked:
            chat = self.lm.chat_prompt(asked[0])
            self.span = LayerSpan(self.lm, chat, source, target, speaking.TARGET_TOKENS)
            self.asked, self.rows, self.sets = asked, [], {}

    def _train(self):
        radii = parse_radii(self._value("radius"))
        n, method, steps = map(self._value, ("n_vectors", "method", "steps"))
        self._open(self._value("source"), self._value("target"))
        runs = len(radii) * (1 if method == "power" else n)  # adam: one vector after another
        self.bar.value, self.bar.max = 0, max(1, runs * (steps + 1))
        how = {"seed": self._value("seed"), "progress": False, "callback": self._watch}
        finished = []
        try:
            for radius in radii:
                self.note(f"training {n} vectors at R = {radius:g} …")
                finished.append(train(self.span, radius, n, method, steps, **how).vectors)
        except Stopped:
            if not finished:
                raise
        finally:
            self._add(finished, "learned")
        stopped = "Stopped, and kept what was finished. " if self.stop.is_set() else ""
        norm, last = self.span.clean_source[0, 1:].norm(dim=-1).median().item(), self.rows[-1]
        share = f"R {last['radius']:g} is {last['radius'] / norm:.0%} of it."
        length = f"The median residual at the source has norm {norm:,.0f}, so {share}"
        self.note(f"{stopped}{length} Next: Compare with random, or choose a vector and scale it.")

    def _watch(self, step, vectors, objective) -> bool:
        """Training's callback: the bar moves on, and Stop stops."""
        self.bar.value += 1
        return self.stop.is_set()

    def _add(self, sets, kind):
        """Measure `sets`, all at once, in place of earlier ones of the same kind and R."""
        if not sets:
            return
        at = ", ".join(f"{vectors.radius:g}" for vectors in sets)
        self.note(f"judging what the model says under the {kind} vectors of R = {at} …")
        rows = measured(self.span, self.asked[0], sets, kind, self.max_new_tokens)
        new = {(kind, vectors.radius): vectors for vectors in sets}
        self.rows = [row for row in self.rows if (row["kind"], row["radius"]) not in new] + rows
        self.sets |= new
        self._draw()

    def _control(self):
        radii = sorted(radius for kind, radius in self.sets if kind == "learned")
        if not radii:
            raise ValueError("There is nothing to compare with yet: train vectors first.")
        wanted = []
        for radius in radii:
            n, seed = len(self.sets["learned", radius]), self._value("seed") + 1
            vectors = random_vectors(self.span, radius, n, seed=seed)
            there = self.sets.get(("random", radius))
            if there is None or not torch.equal(there.tensor, vectors.tensor):
                wanted.append(vectors)
        self._add(wanted, "random")
        inside = ", ".join(f"{radius:g}" for radius in in_range(self.rows))
        found = f"In range: R = {inside}." if inside else "In range: none of these R."
        self.note(f"Random vectors of the same norms, side by side with the learned ones. {found}")

    def _scale(self):
        if not self._value("pick"):  # chosen away while the last value was measured
            return
        (kind, radius, i), coeff = self._value("pick"), self._value("coeff")
        vectors = self.sets[kind, radius][i] * coeff
        clean, *_ = speaking.baseline(self.lm, self.asked[0], self.max_new_tokens)
        (row,) = measured(self.span, self.asked[0], [vectors], kind, self.max_new_tokens)
        change, kl = number(row["objective"]), number(row["kl"], "nats")
        norm = f"‖coefficient · θ‖ = {number(vectors.radius)}"
        self.said.value = render_verdict(row, f"{norm}, objective {change}, KL {kl}")
        title = f"{kind} vector {i} of R {radius:g}, × {coeff:g}"
        self.texts.value = render_texts(clean, row["text"], title)

    def _path(self):
        name = self._value("file").strip().removesuffix(".safetensors")
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ValueError(f"file name {name!r}: use letters, digits, _, - and dots, no folders.")
        return self.folder / f"{name}.safetensors"

    def _save(self):
        if not self.sets:
            raise ValueError("There is nothing to save yet: train vectors first.")
        path = self._path()
        kind, radius = self._value("pick")[:2] or list(self.sets)[-1]
        vectors = self.sets[kind, radius]
        path.parent.mkdir(parents=True, exist_ok=True)
        vectors.save(path)
        what = f"{len(vectors)} {kind} vectors of R = {radius:g}"
        self.note(f"Saved {what} as {path.parent.name}/{path.name}.")

    def _load(self):
        path = self._path()
        if not path.exists():
            there = ", ".join(sorted(p.stem for p in self.folder.glob("*.safetensors"))) or "none"
            place = self.folder.name
            raise ValueError(f"There is no file {path.name!r} in {place}: it has {there}.")
        vectors = SteeringVectors.load(path, self.lm)
        if vectors.radius is None:
            vectors = replace(vectors, radius=vectors.tensor.norm(dim=1).median().item())
        self._open(vectors.source_layer, self._value("target"))
        kind = "random" if vectors.provenance.get("method") == "random" else "learned"
        self._add([vectors], kind)
        what = f"{len(vectors)} vectors of R = {vectors.radius:g}"
        self.note(f"Loaded {path.name}: {what}, source layer {vectors.source_layer}.")

    def _draw(self):
        self.tried.value = render_tried(self.rows)
        by, down = self._value("sort by"), self._value("largest first")
        self.table.value = render_table(self.rows, by, down)
        options = [("(choose)", "")]
        for kind, radius in sorted(self.sets, key=lambda place: place[::-1]):
            for i in range(len(self.sets[kind, radius])):
                options.append((f"R {radius:g}, {kind} {i}", (kind, radius, i)))
        pick = self.fields["pick"]
        if list(pick.options) != options:
            pick.options = options  # ipywidgets then chooses the first: no vector
