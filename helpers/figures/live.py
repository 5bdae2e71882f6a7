"""The live lab: train, compare, scale, save and load vectors from a panel. The work runs beside the kernel's main thread.

One job at a time: a model's hooks belong to whoever set them, so two jobs would steer each other. What is measured, and
how, is in `training`, `goldilocks` and `judging`; here are only the job, its progress and its Stop.
"""

import html
import re
import threading
from dataclasses import replace

import ipywidgets as widgets
import torch

from .. import ledger
from ..metrics.fluency import FluentRange
from ..residual import check_radii
from ..residual.span import LayerSpan
from ..steering import SteeringVectors
from ..studies import speaking
from ..training.optimisers import METHODS, objective, random_vectors, train
from .explorer import html_box, slider
from .render import (
    COLUMNS,
    FONT,
    number,
    render_error,
    render_table,
    render_texts,
    render_tried,
    verdict,
)

BUTTONS = (
    ("Train", "learn vectors at each R", "primary", "100px"),
    ("Stop", "stop, and keep what is finished", "warning", "100px"),
    ("Compare with random", "random vectors of the same norms", "", "180px"),
    ("Save", "write the chosen vector's set", "", "64px"),
    ("Load", "read a set and show what it does", "", "64px"),
)
WORDS = (
    "<b>changed</b>: farther from the unsteered answer than 95 % of the model's own samples. <b>fluent</b>: about as surprising "
    "to the model as its own texts, and no loop. An R is <b>in range</b> where more learned vectors than random ones are both."
)


class Stopped(Exception):
    """Somebody pressed Stop."""


class WatchedSpan(LayerSpan):
    """A layer span that counts training's questions, can be stopped between two of them, and remembers what it was asked."""

    def __init__(self, *args, stop, on_call=lambda n: None, **settings):
        self.stop, self.on_call, self.asked = stop, on_call, None
        super().__init__(*args, **settings)

    def delta(self, vectors):
        if self.asked is None:  # not watched: the span's own check, and what is measured afterwards
            return super().delta(vectors)
        if self.stop.is_set():
            raise Stopped
        out = super().delta(vectors)
        self.asked.append((vectors.detach().cpu(), objective(out.detach()).cpu()))
        self.on_call(len(self.asked))
        return out

    def train(self, radius, n_vectors, method, steps, seed) -> SteeringVectors:
        """`training.train` on this span; after a Stop what was finished, and `Stopped` if that is nothing."""
        self.asked = []
        try:
            return train(self, radius, n_vectors, method, steps, seed=seed, progress=False).vectors
        except Stopped:
            return SteeringVectors(
                self._finished(n_vectors, method, steps),
                self.source_layer,
                self.site,
                float(radius),
                {
                    "model": self.lm.name,
                    "weights_hash": self.lm.weights_hash,
                    "prompts": self.prompts,
                    "target_layers": self.target_layers,
                    "method": method,
                    "seed": seed,
                    "stopped": True,
                },
            )
        finally:
            self.asked = None

    def _finished(self, n_vectors, method, steps):
        """The best of what was asked, chosen as `train` does: a whole set (power: all vectors at once), or the vectors that had
        all their steps (adam: one after another). The first of each is the random start, which is not learned."""
        rows, values = (
            torch.cat([pair[i] for pair in self.asked] or [torch.empty(0)]) for i in (0, 1)
        )
        length = n_vectors if method == "power" else steps + 1
        whole = len(rows) // length
        if whole < (2 if method == "power" else 1):
            raise Stopped
        rows, values = (
            rows[: whole * length].view(whole, length, -1),
            values[: whole * length].view(whole, length),
        )
        if method == "power":
            return rows[1:][values[1:].mean(1).argmax()]
        return rows[torch.arange(whole), 1 + values[:, 1:].argmax(1)]


def measured(span, prompt, sets, kind, max_new_tokens=24) -> list[dict]:
    """A row per vector of each of `sets`: what it does inside, what the model says (all in the same batches), and the two judgements."""
    clean, spread, fluent = speaking.baseline(span.lm, prompt, max_new_tokens)
    theta = SteeringVectors(
        torch.cat([vectors.tensor for vectors in sets]), span.source_layer, span.site
    )
    places = [(vectors.radius, i) for vectors in sets for i in range(len(vectors))]
    rows = [
        {"kind": kind, **one, "vector": i, "radius": radius}
        for (radius, i), one in zip(places, speaking.measured(span, clean, theta, max_new_tokens))
    ]
    return judged(rows, spread, fluent)


def judged(rows, spread, fluent: FluentRange) -> list[dict]:
    """The rows with "changed" and "fluent", as in `judging.table`."""
    surprise = [float("nan") if r["surprise"] is None else r["surprise"] for r in rows]
    return [
        {**row, "changed": row["distance"] > spread, "fluent": bool(good)}
        for row, good in zip(rows, fluent(surprise, [r["text"] for r in rows]))
    ]


def in_range(rows) -> list[float]:
    """The radii at which more learned than random vectors change the answer and stay fluent, of those that have both kinds."""
    both = {}
    for row in rows:
        both.setdefault(row["radius"], {}).setdefault(row["kind"], []).append(
            row["changed"] and row["fluent"]
        )
    return [
        r
        for r, kinds in sorted(both.items())
        if len(kinds) == 2 and sum(kinds["learned"]) > sum(kinds["random"])
    ]


def parse_radii(text) -> list[float]:
    """ "4, 8, 16, 8" → [4.0, 8.0, 16.0], each once. ValueError, with what is allowed, for anything else."""
    parts = [part for part in re.split(r"[,;\s]+", text.strip()) if part]
    try:
        return list(dict.fromkeys(check_radii([float(part) for part in parts])))
    except ValueError as error:
        said = str(error) if "radius" in str(error) else f"R {text!r} is not a list of numbers"
        raise ValueError(
            f"{said.rstrip('.')}: write one or several numbers above 0, such as 10 or 4, 8, 16."
        ) from None


# ---------------------------------------------------------------------------------------------- the panel
class LiveLab(widgets.VBox):
    """The live lab of a model; the arguments are what its fields open with.

    `fields` {name: widget}, `buttons` {name: widget}; `rows`, `sets` {(kind, R): SteeringVectors}; `wait()` for the job."""

    def __init__(
        self,
        lm,
        prompt="What should I do on a rainy Sunday?",
        source_layer=7,
        target_layer=21,
        radii="4, 12, 40",
        n_vectors=4,
        method="power",
        steps=8,
        seed=0,
        max_new_tokens=24,
        folder=None,
    ):
        self.lm, self.max_new_tokens, self.rows, self.sets, self.span, self.asked = (
            lm,
            max_new_tokens,
            [],
            {},
            None,
            None,
        )
        self.folder = folder or ledger.build_folder() / "vectors"
        self.stop, self.thread, self.running, self.again, self.lock = (
            threading.Event(),
            None,
            None,
            False,
            threading.Lock(),
        )
        self.fields = self._fields(
            prompt, source_layer, target_layer, radii, n_vectors, method, steps, seed
        )
        self.buttons = {
            name: widgets.Button(
                description=name, tooltip=tip, button_style=style, layout={"width": width}
            )
            for name, tip, style, width in BUTTONS
        }
        self.bar = widgets.IntProgress(0, 0, 1, description="progress", layout={"width": "420px"})
        self.status, self.tried, self.table = html_box("44px"), html_box("188px"), html_box("152px")
        self.texts, self.said = html_box("108px"), html_box("28px")
        super().__init__(self._layout(), layout={"max_width": "1080px"})
        jobs = {
            "Train": self._train,
            "Compare with random": self._control,
            "Save": self._save,
            "Load": self._load,
        }
        for name, action in jobs.items():
            self.buttons[name].on_click(lambda _, action=action: self._start(action))
        self.buttons["Stop"].on_click(lambda _: self._stop())
        for name in ("sort by", "largest first"):
            self.fields[name].observe(lambda _: self._draw(), "value")
        for name in ("pick", "coeff"):
            self.fields[name].observe(
                lambda change: self._start(self._scale) if self.fields["pick"].value else None,
                "value",
            )
        self._busy(None)
        self.note("Press Train. Nothing is trained by typing or sliding.")

    def _fields(self, prompt, source_layer, target_layer, radii, n_vectors, method, steps, seed):
        wide = {"style": {"description_width": "190px"}, "layout": {"width": "310px"}}
        short = {"style": {"description_width": "110px"}, "layout": {"width": "220px"}}
        last = self.lm.n_layers - 1
        return {
            "prompt": widgets.Textarea(
                prompt,
                description="prompt",
                continuous_update=False,
                rows=2,
                style={"description_width": "60px"},
                layout={"width": "720px", "height": "52px"},
            ),
            "radius": widgets.Text(
                radii,
                description="R (norm of θ), one or several",
                continuous_update=False,
                style={"description_width": "190px"},
                layout={"width": "530px"},
            ),
            "source": widgets.IntText(
                source_layer, description=f"source layer, 0 … {last - 1}", **wide
            ),
            "target": widgets.IntText(
                target_layer, description=f"target layer, 1 … {last}", **wide
            ),
            "n_vectors": widgets.IntText(n_vectors, description="vectors (number)", **wide),
            "method": widgets.Dropdown(
                options=METHODS, value=method, description="method", **short
            ),
            "steps": widgets.IntText(steps, description="steps (number)", **short),
            "seed": widgets.IntText(seed, description="seed (number)", **short),
            "sort by": widgets.Dropdown(
                options=[(label, name) for name, label in COLUMNS.items()],
                description="sort by",
                layout={"width": "280px"},
            ),
            "largest first": widgets.Checkbox(
                False, description="largest first", indent=False, layout={"width": "140px"}
            ),
            "pick": widgets.Dropdown(
                options=[("(none yet)", "")], description="vector", layout={"width": "250px"}
            ),
            "coeff": slider(
                [x / 2 for x in range(-6, 7)], 1.0, "coefficient (times θ)", "140px", "370px"
            ),
            "file": widgets.Text(
                "my_vectors",
                description="file name",
                continuous_update=False,
                layout={"width": "220px"},
            ),
        }

    def _layout(self):
        f, b = self.fields, self.buttons
        settings = widgets.HBox(
            [
                widgets.VBox([f[name] for name in names])
                for names in (("n_vectors", "source", "target"), ("method", "steps", "seed"))
            ]
        )
        words = html_box(
            "54px",
            f'<div style="{FONT};font-size:12.5px;line-height:1.35;padding-left:8px">{WORDS}</div>',
        )
        return [
            f["prompt"],
            widgets.HBox(
                [
                    widgets.VBox([f["radius"], settings, words], layout={"flex": "0 0 536px"}),
                    self.tried,
                ]
            ),
            widgets.HBox([b["Train"], b["Stop"], b["Compare with random"], self.bar]),
            self.status,
            widgets.HBox([f["sort by"], f["largest first"]]),
            self.table,
            widgets.HBox([f["pick"], f["coeff"], f["file"], b["Save"], b["Load"]]),
            self.said,
            self.texts,
        ]

    # -- jobs
    def _start(self, action):
        """Run `action` beside the main thread. A second job is refused, but for a slider that moved on: its newest value follows."""
        with self.lock:
            if self.running:
                if action == self.running == self._scale:
                    self.again = True
                    return
                return self.note("One thing at a time: wait, or press Stop.")
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

    def wait(self, seconds=None):
        """Until the running job has ended; TimeoutError if it takes longer."""
        if self.thread:
            self.thread.join(seconds)
            if self.thread.is_alive():
                raise TimeoutError(f"the job still runs after {seconds} s.")

    def _stop(self):
        self.stop.set()
        self.note("Stopping …")

    def _busy(self, action):
        self.running = action
        for name, button in self.buttons.items():
            button.disabled = bool(action) != (name == "Stop")
        for name in ("pick", "coeff"):  # a slider that goes dead under the hand loses the next key
            self.fields[name].disabled = action not in (None, self._scale) or not self.sets

    def note(self, text):
        self.status.value = f'<div style="{FONT};font-size:15px">{html.escape(text)}</div>'

    # -- what the buttons do
    def _value(self, name):
        return self.fields[name].value

    def _open(self, source, target):
        """The span and the baseline of the prompt as typed; results of another prompt or other layers are put away."""
        asked = (self._value("prompt").strip(), source, target)
        if asked != self.asked:
            chat = self.lm.chat_prompt(asked[0])
            self.span = WatchedSpan(
                self.lm, chat, source, target, speaking.TARGET_TOKENS, stop=self.stop
            )
            self.asked, self.rows, self.sets = asked, [], {}
        self.span.on_call = lambda n: setattr(self.bar, "value", self.bar.value + 1)

    def _train(self):
        radii, n, method, steps = (
            parse_radii(self._value("radius")),
            *map(self._value, ("n_vectors", "method", "steps")),
        )
        self._open(self._value("source"), self._value("target"))
        a_set = -(-n // self.span.chunk) if method == "power" else n
        self.bar.value, self.bar.max = 0, max(1, len(radii) * a_set * (steps + 1))
        finished = []
        try:
            for radius in radii:
                if self.stop.is_set() and finished:
                    break
                self.note(f"training {n} vectors at R = {radius:g} …")
                finished.append(self.span.train(radius, n, method, steps, self._value("seed")))
        finally:
            self._add(finished, "learned")
        stopped = "Stopped, and kept what was finished. " if self.stop.is_set() else ""
        self.note(
            f"{stopped}{self._yardstick()} Next: Compare with random, or choose a vector and scale it."
        )

    def _yardstick(self):
        norm, radius = (
            self.span.clean_source[0, 1:].norm(dim=-1).median().item(),
            self.rows[-1]["radius"],
        )
        return f"The median residual at the source has norm {norm:,.0f}, so R {radius:g} is {radius / norm:.0%} of it."

    def _add(self, sets, kind):
        """Let the model speak under `sets`, all at once, and put their rows in place of earlier ones of the same kind and R."""
        if not sets:
            return
        at = ", ".join(f"{vectors.radius:g}" for vectors in sets)
        self.note(
            f"letting the model speak under the {kind} vectors of R = {at}, and judging it "
            "(the first time also: what is fluent for this model) …"
        )
        rows, new = (
            measured(self.span, self.asked[0], sets, kind, self.max_new_tokens),
            {(kind, v.radius): v for v in sets},
        )
        self.rows = [r for r in self.rows if (r["kind"], r["radius"]) not in new] + rows
        self.sets |= new
        self._draw()

    def _control(self):
        learned, seed = (
            {r: v for (kind, r), v in self.sets.items() if kind == "learned"},
            self._value("seed") + 1,
        )
        if not learned:
            raise ValueError("There is nothing to compare with yet: train vectors first.")
        wanted = {
            r: random_vectors(self.span, r, len(learned[r]), seed=seed) for r in sorted(learned)
        }
        self.bar.value, self.bar.max = 0, 1
        self._add([new for r, new in wanted.items() if not self._has(new)], "random")
        self.bar.value = 1
        inside = in_range(self.rows)
        self.note(
            "Random vectors of the same norms, side by side with the learned ones. In range: "
            + (f"R = {', '.join(f'{r:g}' for r in inside)}." if inside else "none of these R.")
        )

    def _has(self, vectors):
        """Is just this random set there already?"""
        there = self.sets.get(("random", vectors.radius))
        return there is not None and torch.equal(there.tensor, vectors.tensor)

    def _scale(self):
        if not self.fields["pick"].value:  # chosen away while the last value was measured
            return
        (kind, radius, i), coeff = self.fields["pick"].value, self.fields["coeff"].value
        vectors = self.sets[kind, radius][i] * coeff
        clean, _, _ = speaking.baseline(self.lm, self.asked[0], self.max_new_tokens)
        row = measured(self.span, self.asked[0], [vectors], kind, self.max_new_tokens)[0]
        numbers = (
            f"‖coefficient · θ‖ = {number(vectors.radius)}, objective {number(row['objective'])}, "
            f"KL {number(row['kl'], 'nats')}"
        )
        self.said.value = (
            f'<div style="{FONT};font-size:15px"><b>{verdict(row)}</b> &nbsp; {numbers}</div>'
        )
        self.texts.value = render_texts(
            clean, row["text"], f"{kind} vector {i} of R {radius:g}, × {coeff:g}"
        )

    def _path(self):
        name = self._value("file").strip().removesuffix(".safetensors")
        if not re.fullmatch(r"[\w-][\w.-]*", name):
            raise ValueError(
                f"The file name {name!r} does not do: use letters, digits, _, - and dots, no folders."
            )
        return self.folder / f"{name}.safetensors"

    def _save(self):
        if not self.sets:
            raise ValueError("There is nothing to save yet: train vectors first.")
        path, (kind, radius, _) = (
            self._path(),
            self.fields["pick"].value or (*list(self.sets)[-1], 0),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        self.sets[kind, radius].save(path)
        self.note(
            f"Saved {len(self.sets[kind, radius])} {kind} vectors of R = {radius:g} as {path.parent.name}/{path.name}."
        )

    def _load(self):
        path = self._path()
        if not path.exists():
            there = ", ".join(sorted(p.stem for p in self.folder.glob("*.safetensors"))) or "none"
            raise ValueError(
                f"There is no file {path.name!r} in {self.folder.name}: it has {there}."
            )
        vectors = SteeringVectors.load(path, self.lm)
        if vectors.radius is None:
            vectors = replace(vectors, radius=vectors.tensor.norm(dim=1).median().item())
        self._open(vectors.source_layer, self._value("target"))
        self._add(
            [vectors], "random" if vectors.provenance.get("method") == "random" else "learned"
        )
        self.note(
            f"Loaded {path.name}: {len(vectors)} vectors of R = {vectors.radius:g}, source layer {vectors.source_layer}."
        )

    def _draw(self):
        self.tried.value = render_tried(self.rows)
        self.table.value = render_table(
            self.rows, self._value("sort by"), self._value("largest first")
        )
        in_order = sorted(self.sets, key=lambda place: place[::-1])
        options = [("(choose)", "")] + [
            (f"R {r:g}, {kind} {i}", (kind, r, i))
            for kind, r in in_order
            for i in range(len(self.sets[kind, r]))
        ]
        pick, there = self.fields["pick"], [value for _, value in options]
        if there != [value for _, value in pick.options]:
            pick.options = options  # ipywidgets then chooses the first: no vector
