"""Memory of the fullest rank, counted operation by operation, at the moments when it can be greatest.

    forward, backward …  | the loss            | the head | a layer's backward pass | the update
    activations pile up  | + a chunk of logits | + it, twice | + what it computes anew | gradients, pieces of state

Each moment is a table of rows; the moment whose sum is greatest is the answer, so rows always add up to the total.
`puna.plan.activations` counts the layers; all is held against real steps in tests/plan.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

from puna.plan.activations import LayerBytes, Layers, layer_bytes
from puna.plan.case import RECOMPUTE, Case, Recompute

#: Rows of the table, in its order, and what each of them is.
ROWS = {
    "weights": "this rank's share",
    "gradients": "this rank's share, or what is on its way to the host",
    "optimizer state": "two moments a weight, with their scales",
    "gathered weights": "sharded weights made whole, of the units in use and the next",
    "cast weights": "bf16 casts of fp32 weights that wait for the backward pass",
    "activations": "kept for the backward pass, of all micro-batches in flight",
    "working memory": "what one layer computes again, and its gradients; pieces of the update",
    "logits and head": "a chunk of logits, and the gradients of head and hidden states",
    "communication buffers": "sums of gradients between ranks, and what pipeline stages send",
    "runtime": "libraries, a device's context, and what the allocator cannot use",
}

#: puna.train.loss: logits computed at a time, and those that go through softmax at a time.
CHUNK_LOGITS = 1 << 25
SOFTMAX_PIECE = {True: 1 << 19, False: 1 << 26}  # on a CPU without a kernel for it, elsewhere

#: puna.train.optimizer: numbers updated at a time, and fp32 temporaries of each: fp32 state, bf16, codes.
UPDATE_PIECE = {True: 1 << 16, False: 1 << 24}
UPDATE_TEMPORARIES = {"fp32": 2, "bf16": 8, "codes": 10}

#: puna.model.offload: layers' inputs on their way to the host.
OFFLOADS_IN_FLIGHT = 2

#: puna.train.gradients: bytes of gradients on their way to the host, and temporaries of a sum in bf16, each in 4 bytes.
IN_FLIGHT_BYTES = 1 << 30
SUM_TEMPORARIES = 4

#: An accelerator's context and libraries, an axis's communicators, and the share of all that changes in size which
#: the allocator loses. Assumed.
CONTEXT_BYTES, COMMUNICATOR_BYTES, ALLOCATOR_SHARE = 0.6 * 2**30, 0.2 * 2**30, 0.02

#: A process's libraries on a CPU, and the share of what changes in size that the C library keeps in pieces too small to
#: use (`puna.devices.keep_freed_memory`). Six runs of 58 to 602 M weights, eager, compiled and with recomputed blocks,
#: in bf16 and fp32, held what this says within a sixth.
PROCESS_BYTES, PIECES_SHARE = 0.45 * 2**30, 0.4


@dataclass(frozen=True, eq=False)
class Memory:
    """What the fullest rank takes, in bytes.

    Attributes:
        fullest: the moment when it takes most.
        runtime: what is no tensor.
        pp_rank: the fullest pipeline rank.
    """

    fullest: "Moment"
    runtime: float
    pp_rank: int = 0

    @property
    def moment(self) -> str:
        """Which it is."""
        return self.fullest.name

    @cached_property
    def rows(self) -> dict[str, float]:
        """Row of ROWS -> bytes at that moment."""
        rows = self.fullest.rows() | {"runtime": self.runtime}
        return {name: rows.get(name, 0.0) for name in ROWS}

    @property
    def total(self) -> float:
        """Sum of the rows."""
        return self.fullest.total + self.runtime

    @property
    def gib(self) -> float:
        """Sum of the rows in GiB."""
        return self.total / 2**30


class Moment(NamedTuple):
    """A moment of a rank, in bytes.

    Attributes:
        name: what happens.
        shared: the rows that are the same under any recomputation.
        total: of everything.
        activations: kept for the backward pass.
        cast: weights that are cast for products.
        formed: what a layer computes anew.
    """

    name: str
    shared: dict[str, float]
    total: float
    activations: float = 0.0
    cast: float = 0.0
    formed: float = 0.0

    @classmethod
    def of(cls, name: str, shared: dict[str, float]) -> "Moment":
        """A moment without what depends on recomputation."""
        return cls(name, shared, sum(shared.values()))

    def under(self, activations: float, cast: float, formed: float) -> "Moment":
        """The moment under a recomputation."""
        return Moment(self.name, self.shared, self.total + activations + cast + formed, activations, cast, formed)

    def rows(self) -> dict[str, float]:
        """Row of ROWS -> bytes."""
        own = {"activations": self.activations, "cast weights": self.cast}
        return self.shared | own | {"working memory": self.shared.get("working memory", 0.0) + self.formed}


class Pass(NamedTuple):
    """A micro-batch on its way back through the largest of a rank's stages.

    Attributes:
        in_flight: activations that there are when it begins, in micro-batches of one stage.
        others: layers of the rank's other stages that have gradients by then.
        is_again: whether this stage's have, from earlier micro-batches.
        is_over: whether the other stages have had their last micro-batch, the loss too. Torch's pipelines then sum
            their gradients over the shards; until then they and the weights stay whole.
    """

    in_flight: int
    others: int
    is_again: bool
    is_over: bool = False


def memory(case: Case, *, with_runtime: bool = True) -> Memory:
    """The memory of the fullest rank at its fullest moment.

    Args:
        case: recipe and layout.
        with_runtime: count what is no tensor, too.
    """
    return Footprint(case).memory(case.recompute, with_runtime=with_runtime)


class Footprint:
    """The memory of a layout under one recomputation or another: what all of them share is formed once.

    Args:
        case: recipe and layout, whatever the recipe recomputes.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self._layer: dict[str, LayerBytes] = {}
        self._all_ranks = _Rank(case)

    def memory(self, recompute: Recompute, *, with_runtime: bool = True) -> Memory:
        """As the function of that name."""
        layers = {size: self._layers(recompute, size) for size in {rank.size for rank in self._ranks}}
        found = [(rank.fullest(layers[rank.size]), rank.rank) for rank in self._ranks]
        fullest, pp_rank = max(found, key=lambda each: each[0].total)
        moving = fullest.total - fullest.shared["weights"] - fullest.shared["optimizer state"]
        return Memory(fullest, _runtime(self.case, moving) if with_runtime else 0.0, pp_rank)

    @cached_property
    def at_most(self) -> float:
        """Bytes, quickly, that `memory` never passes: of all ranks, moments and recomputations the most of each row."""
        ranks, layers = self._all_ranks, [self._layer_bytes(mode) for mode in RECOMPUTE]
        moving = ranks.at_most(
            LayerBytes(*(max(map(attrgetter(name), layers)) for name in ("kept", "formed", "cast"))),
            leaving=OFFLOADS_IN_FLIGHT * self.case.stream_bytes,
        )
        return ranks.stays + moving + _runtime(self.case, moving)

    @cached_property
    def _ranks(self) -> "list[_Rank]":
        last = self.case.layout.pp - 1
        return [_Rank(self.case, rank) for rank in sorted({0, min(1, last), last})]

    def _layers(self, recompute: Recompute, size: int) -> Layers:
        case, mode = self.case, recompute.mode
        leaving = OFFLOADS_IN_FLIGHT * case.stream_bytes if mode == "offload" else 0
        return Layers(
            self._layer_bytes("none"), self._layer_bytes(mode), size, case.layers_again(recompute, size), leaving,
            casts_once=case.layout.casts_once,
        )  # fmt: skip

    def _layer_bytes(self, mode: str) -> LayerBytes:
        if mode not in self._layer:
            self._layer[mode] = layer_bytes(self.case, mode)
        return self._layer[mode]


class _Rank:
    """The moments of one pipeline rank.

    Args:
        case: recipe and layout.
        rank: which; None: one that has whatever any of them has, for `at_most`.
    """

    def __init__(self, case: Case, rank: int | None = None) -> None:
        self.case, self.rank, self._is_all = case, rank or 0, rank is None
        layout = case.layout
        self.stages = case.stages_of(self.rank)
        self.n_layers, self.size = sum(self.stages), self.stages[0]
        self.has_embedding, self.has_head = rank in (0, None), rank in (layout.pp - 1, None)
        self.hidden = case.hidden_bytes
        #: torch's pipelines sum whole gradients over micro-batches and reduce them once a stage, after its last one.
        self.sums_whole = layout.pp > 1 and case.is_sharded
        self.kinds = {"layer": self.n_layers, "embedding": int(self.has_embedding), "norm": int(self.has_head),
                      "head": int(self.has_head)}  # fmt: skip
        self.parts = case.weights.parts(layout.tp, layout.shard_size)
        #: Whole weights outside the layers, and layers whose weights are gathered together.
        self.root = sum(self.kinds[kind] * self.parts[kind].gathered for kind in ("embedding", "norm", "head"))
        self._embedding = self.kinds["embedding"] * self.parts["embedding"].gathered
        self.own = sum(n * self.parts[kind].own for kind, n in self.kinds.items())
        self._largest = max(self.parts[kind].largest for kind in self.kinds)
        self.unit = min(case.recipe.parallel.layers_per_unit, self.size)
        is_sum = self.sums_whole or (layout.micro_batches > 1 and not case.recipe.optimizer.in_backward)
        self.gradient_bytes = 4 if is_sum else case.weights.weight_bytes  # what comes in bf16 is summed in fp32
        self._always = {
            "weights": self.own * case.weights.weight_bytes,
            "optimizer state": sum(n * self.parts[kind].state for kind, n in self.kinds.items()),
            "communication buffers": self._pipeline_buffers(),
        }
        #: Kept beside the layers' activations, of each micro-batch in flight and in all.
        self._output = case.stream_bytes if layout.pp > 1 else 0
        self._beside = self._deferred()
        D, tp = case.config.hidden_size, layout.tp
        #: Rotations and ids; with the final norm.
        self._rotations = (2 * 4 * case.config.head_dim + 24) * case.tokens
        self._ends = self._rotations + case.tokens * (4 + case.compute_bytes) * D / tp + self.hidden
        self._shared: dict[tuple[int, Pass], Moment] = {}

    @cached_property
    def _fullest(self) -> list[tuple[Pass, Moment | None]]:
        """With the moment of the loss that comes before each."""
        return [(each, self._loss(each) if self.has_head and not each.is_over else None)
                for each in self._fullest_passes()]  # fmt: skip

    @cached_property
    def _end(self) -> Moment:
        update = {**self._always, "gradients": self._gradients_at_update(), "working memory": self._update()}
        sums = Moment.of("the last sums of gradients", self._last_sums())
        return max(sums, Moment.of("the update", update), key=attrgetter("total"))

    def fullest(self, layers: Layers) -> Moment:
        """From the loss to the last layer's backward pass, or at the end of the step."""
        found = self._end.under(0.0, layers.always_cast, 0.0)
        most = found.total
        for each, loss in self._fullest:
            n = each.in_flight
            beside = n * self._output + layers.leaving + self._beside
            if loss is not None:
                kept, cast = n * layers.kept + beside + self._ends, n * layers.keeping.cast * layers.n_keeping
                if loss.total + kept + cast > most:
                    found = loss.under(kept, cast, 0.0)
                    most = found.total
            for done, left, formed in layers.turns:
                kept = (n - 1) * layers.kept + left + beside * (1 - done / self.size / n) + self._rotations
                cast, shared = layers.cast(n, done), self._backward(done, each)
                if shared.total + kept + cast + formed > most:
                    found = shared.under(kept, cast, formed)
                    most = found.total
        return found

    @property
    def stays(self) -> float:
        """Bytes of weights and of the optimizer's state."""
        return self._always["weights"] + self._always["optimizer state"]

    def at_most(self, layer: LayerBytes, leaving: float) -> float:
        """Bytes beyond what stays that no moment passes: of each row the most of any moment.

        Args:
            layer: the most that a layer takes.
            leaving: the most that is on its way to the host.
        """
        n = self._in_flight
        kept = n * (self.size * layer.kept + self._output) + leaving + self._beside + self._ends
        cast = (n * self.size + 1) * layer.cast
        always, at_ends, in_backward = self._most()
        return always + max(at_ends, in_backward + layer.formed) + kept + cast

    def _most(self) -> tuple[float, float, float]:
        """The most that is there besides activations: always, at the loss or the update, and in a backward pass."""
        full = Pass(self._in_flight, self.n_layers - self.size, is_again=True)
        always = self._always["communication buffers"] + self._gradients(self.size, full)
        always += sum(self._gathered(self.size, full).values())
        if self.case.is_sharded:
            unit = self.unit * self.parts["layer"].gathered
            always += (self.case.compute_bytes + 4) * (unit + self.root)
        at_ends = max(self._logits(), 2 * (self._head_gradient() + self.hidden), self._update())
        return always, at_ends, self._working() + self._head_gradient()

    @property
    def _in_flight(self) -> int:
        return self.case.in_flight(self.rank)

    def _fullest_passes(self) -> Iterator[Pass]:
        """Those that begin with the most activations, or with fewer and more gradients."""
        layout, n = self.case.layout, self._in_flight
        others = self.n_layers - self.size
        comes_again = layout.micro_batches * layout.stages_per_rank > n
        if others and layout.micro_batches == layout.pp:  # every micro-batch leaves a stage before one enters the next
            yield Pass(n, 0, is_again=comes_again)
            yield Pass(n - 1, 0, is_again=True)
            yield Pass(layout.pp, others, is_again=False, is_over=True)
            yield Pass(layout.pp - 1, others, is_again=True, is_over=True)
            return
        yield Pass(n, others, is_again=comes_again)
        if not comes_again and n > 1:
            yield Pass(n - 1, others, is_again=True)

    def _deferred(self) -> float:
        """Gradients of products that wait, in a zero-bubble pipeline, for those of the weights to be formed."""
        case = self.case
        if case.layout.pp == 1 or case.recipe.parallel.schedule != "zero-bubble":
            return 0
        Q, K, F = case.widths
        numbers = Q + 2 * K + 2 * F + 2 * case.config.hidden_size
        waiting = case.layout.pp if self._is_all else self.rank + 1
        return waiting * self.size * case.compute_bytes * numbers * case.tokens

    def _head_gradient(self) -> float:
        case = self.case
        size = case.compute_bytes if case.is_sharded else case.weights.weight_bytes
        return size * case.config.vocab_size * case.config.hidden_size / case.layout.tp

    def _logits(self) -> float:
        case, c = self.case, self.case.compute_bytes
        V = case.config.vocab_size // case.layout.tp
        n = min(case.tokens, max(1, CHUNK_LOGITS // V)) * V
        is_cast = not case.is_sharded and c != case.weights.weight_bytes
        cast = c * V * case.config.hidden_size if is_cast else 0
        softmax = product = 0
        if c == 2:
            softmax = 4 * min(n, 2 * SOFTMAX_PIECE[case.is_cpu])
            product = cast + (4 * V * case.config.hidden_size if case.is_cpu else 0)  # a CPU adds bf16 up in fp32
        return c * n + max(softmax, product) + cast + self._head_gradient() + 2 * self.hidden

    def _gathered(self, layers: float, way: Pass | None = None) -> dict[str, float]:
        """Whole weights: those outside layers, and of so many layers of a stage and of those that are not over."""
        case = self.case
        if not case.is_sharded:
            return {}
        root = self.root
        if way is not None and self.sums_whole:
            root = self._embedding if way.is_over else root
            layers += 0 if way.is_over else way.others
        if not case.recipe.parallel.reshards:
            layers = max(layers, self.n_layers)
        return {"gathered weights": case.compute_bytes * (root + layers * self.parts["layer"].gathered)}

    def _loss(self, before: Pass) -> Moment:
        """The loss or the gradient of the head, whichever takes more."""
        shared = {**self._always, **self._gathered(0, before), "gradients": self._gradients(0, before)}
        at_loss, after = self._logits(), 2 * (self._head_gradient() + self.hidden)
        if at_loss >= after:
            return Moment.of("the loss", {**shared, "logits and head": at_loss})
        return Moment.of("the gradient of the head", {**shared, "logits and head": after})

    def _backward(self, done: int, way: Pass) -> Moment:
        """While a layer is in its backward pass, after `done` others."""
        key = (done, way)
        if key not in self._shared:
            self._shared[key] = Moment.of("the backward pass of a layer", self._shared_rows(done, way))
        return self._shared[key]

    def _shared_rows(self, done: int, way: Pass) -> dict[str, float]:
        case, rows, c = self.case, dict(self._always), self.case.compute_bytes
        rows["working memory"] = self._working()
        rows["gradients"] = self._gradients(done, way)
        if case.is_sharded:
            whole = min(self.size - done, 2 * self.unit)
            rows |= self._gathered(whole + done if self.sums_whole else whole, way)
            if done and not self.sums_whole:  # sums of the unit before are under way
                rows["communication buffers"] += (c + 4) * self.unit * self.parts["layer"].gathered
            rows["logits and head"] = self._head_gradient() if self.has_head and not way.is_over else 0
        return rows

    def _working(self) -> float:
        """Gradients that a layer's backward pass has at a time."""
        case, c, F = self.case, self.case.compute_bytes, self.case.widths[2]
        exchanged = self.hidden if case.layout.tp > 1 else 0
        down = 0 if case.uses_gradients_at_once else c * case.config.hidden_size * F
        return 2 * c * F * case.tokens + down + exchanged + case.stream_bytes

    def _last_sums(self) -> dict[str, float]:
        """What lies outside layers is summed over the shards last; in pipelines, all of the first stage is."""
        last = Pass(0, self.n_layers - self.size, is_again=True, is_over=self.n_layers > self.size)
        rows = {**self._always, "gradients": self._gradients(self.size, last)}
        if self.sums_whole:
            rows |= self._gathered(self.size, last)
            root = self._embedding if last.is_over else self.root
            rows["communication buffers"] += 4 * max(self.unit * self.parts["layer"].gathered, root)
        elif self.case.is_sharded:
            rows |= self._gathered(0)
            rows["communication buffers"] += (self.case.compute_bytes + 4) * self.root
        return rows

    def _gradients(self, done: int, way: Pass) -> float:
        """Gradients there are when so many layers of the stage have been through the backward pass."""
        layers = way.others + (self.size if way.is_again else done)
        if self.sums_whole:
            held = attrgetter("own" if way.is_over else "gathered")
            after_loss = sum(self.kinds[kind] * held(self.parts[kind]) for kind in ("norm", "head"))
            outside = (after_loss if layers > done else 0) + (self._embedding if layers >= self.n_layers else 0)
            whole = (layers - way.others) * self.parts["layer"].gathered
            return 4 * (outside + way.others * held(self.parts["layer"]) + whole)
        leaving = self._leaving()
        if leaving is not None:
            return leaving if layers else 0
        if layers >= self.n_layers:
            return self._all_gradients()
        head = 0 if self.case.is_sharded else sum(self.kinds[k] * self.parts[k].own for k in ("norm", "head"))
        return self.gradient_bytes * (layers * self.parts["layer"].own + head * (layers > 0))

    def _all_gradients(self) -> float:
        return self.gradient_bytes * self.own

    def _leaving(self) -> float | None:
        """Gradients on the device where they do not stay; None: they stay."""
        optimizer = self.case.recipe.optimizer
        if not optimizer.in_backward:
            return None
        largest = self.gradient_bytes * self._largest
        if self.case.uses_gradients_at_once:
            return largest
        if self.case.is_cpu:
            return None
        piece = min(largest / self.gradient_bytes, UPDATE_PIECE[False])
        is_rounded = self.gradient_bytes == 2 and self.case.layout.micro_batches > 1
        summing = 4 * SUM_TEMPORARIES * piece if is_rounded else 0
        return min(self._all_gradients(), IN_FLIGHT_BYTES + largest) + summing

    def _gradients_at_update(self) -> float:
        if self._leaving() is None:
            return self._all_gradients()
        return self.gradient_bytes * self._largest

    def _update(self) -> float:
        if self.case.has_update_kernel:
            return 0
        bits, weights = self.case.recipe.optimizer.state_bits, self.case.weights
        kind = "codes" if bits < 32 else "fp32" if weights.weight_bytes == 4 else "bf16"
        return UPDATE_TEMPORARIES[kind] * 4 * min(self._largest, UPDATE_PIECE[self.case.is_cpu])

    def _pipeline_buffers(self) -> float:
        """Torch's pipeline stages have a buffer a micro-batch for what comes from either side.

        When the backward pass is split, they also keep the gradients that they have sent.
        """
        layout = self.case.layout
        if layout.pp == 1:
            return 0
        first, last = (0, 0) if self._is_all else (self.has_embedding, self.has_head)
        sides = 2 * layout.stages_per_rank - first - last
        if self.case.recipe.parallel.schedule == "zero-bubble":
            sides += layout.stages_per_rank - first
        return sides * layout.micro_batches * self.hidden / layout.tp


def _runtime(case: Case, moving: float) -> float:
    """Bytes that are no tensor, with so many bytes of tensors that come and go."""
    if case.is_cpu:
        return PROCESS_BYTES + PIECES_SHARE * moving
    axes = sum(size > 1 for size in case.layout.sizes)
    return CONTEXT_BYTES + COMMUNICATOR_BYTES * axes + ALLOCATOR_SHARE * moving
