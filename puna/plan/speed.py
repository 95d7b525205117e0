"""Time of an optimizer step from a few physical constants: rates of products, memory and links, and what overlaps.

    micro-batch of a rank = layers x (forward + backward + what is exchanged and cannot hide behind them) + head
    step                  = micro-batches x the slowest rank + what that idles in the pipeline + update

The head is the last stage's, which may have fewer layers than the slowest.

Recomputation takes time and never counts as work: MFU is that of `puna.model.flops`, in both conventions. Rows are
taken as one document each, so packed short documents run somewhat faster than said here.
"""

from dataclasses import dataclass
from functools import cached_property

from puna.devices import Profile
from puna.model.flops import flops_per_token
from puna.parallel.layout import Layout
from puna.plan.case import Case, Recompute

#: Rows of the table, in its order, and what each of them is.
ROWS = {
    "products": "matrix products of layers and head",
    "attention": "scores and their gradients, the causal half",
    "memory-bound": "norms, rotations, gates, logits",
    "recomputation": "of activations in the backward pass",
    "tensor parallel": "gathers and sums of tokens; nothing hides them",
    "context parallel": "exchange of keys and values",
    "sharding": "gathers of weights and sums of gradients that products do not hide",
    "replicas": "sums of gradients over dp_replicate",
    "pipeline": "idle time, and what stages wait for each other",
    "host": "gradients and activations on their way to host memory and back",
    "update": "the optimizer",
}

#: Share of a link's, and of the memory's, rate that long transfers reach.
LINK_SHARE, MEMORY_SHARE = 0.8, 0.8
#: Share of a transfer that hides behind products; the rest waits, or slows them down.
OVERLAP = 0.85
#: Tokens of a micro-batch at which products run at half their rate.
HALF_RATE_TOKENS = 256
#: Seconds before a collective's first byte, and between two kernels of a host that cannot keep up.
COLLECTIVE_SECONDS, KERNEL_SECONDS = 20e-6, 5e-6
#: Kernels of a layer's forward pass, eager and compiled, and as how many of them its host takes tensor parallelism and
#: sharding (results/host.json).
KERNELS, TENSOR_PARALLEL_KERNELS, SHARDING_KERNELS = {False: 45, True: 20}, 40, 70
#: Share of eager element-wise traffic that is left when layers are compiled.
FUSED = 0.3
#: Share of the memory's rate at which one kernel makes the update, reading and writing each number once.
UPDATE_SHARE = 0.5
#: Bytes that the update reads and writes a weight in a dozen operations: fp32, bf16 with random bits, codes.
UPDATE_BYTES = {"fp32": 100, "bf16": 200, "codes": 350}
#: Idle time of a zero-bubble pipeline, as a share of an interleaved one's (arXiv:2401.10241, table 2: ZB-H1).
ZERO_BUBBLE = 1 / 3


_NOTHING = dict.fromkeys(ROWS, 0.0)


@dataclass(frozen=True)
class Cluster:
    """What the ranks run on.

    Attributes:
        device: all are alike.
        per_node: devices of a node.
    """

    device: Profile
    per_node: int = 8

    def seconds(self, sent: float, size: int, stride: int) -> float:
        """Seconds of a gather or scatter among `size` ranks, `stride` apart.

        Args:
            sent: bytes of the whole; each rank lacks all but its part.
            size: ranks of the group.
            stride: between neighbours, in ranks.
        """
        if size == 1:
            return 0.0
        here = min(size, max(1, self.per_node // stride))
        rate = self.device.link_rate
        if here < size:  # each node's members of the group drive their own ports together
            rate = min(rate, here * self.device.node_link_rate)
        return sent * (size - 1) / size / (rate * 1e9 * LINK_SHARE) + COLLECTIVE_SECONDS


@dataclass(frozen=True, eq=False)
class Speed:
    """How fast a layout trains.

    Attributes:
        rows: row of ROWS -> seconds of a step; they add up to it.
        case: what is trained.
        peak_flops: of all devices.
    """

    rows: dict[str, float]
    case: Case
    peak_flops: float

    @cached_property
    def step_seconds(self) -> float:
        """Sum of the rows."""
        return sum(self.rows.values())

    @property
    def tokens_per_second(self) -> float:
        """Over all devices."""
        return self.case.recipe.batch_tokens / self.step_seconds

    @property
    def mfu(self) -> dict[str, float]:
        """Convention of `puna.model.flops` -> share of the devices' peak."""
        config, length = self.case.config, self.case.recipe.sequence_length
        return {
            convention: flops_per_token(config, length, convention=convention)
            * self.tokens_per_second
            / self.peak_flops
            for convention in ("full", "causal")
        }


class Passes:
    """What layers' passes and the head take, formed once for all layouts that share rows and matrices alike.

    Args:
        cluster: what they run on.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._layers: dict[tuple[int, int, int, bool, str], Layer] = {}
        self._heads: dict[tuple[int, int, int], dict[str, float]] = {}

    def layer(self, case: Case, mode: str) -> "Layer":
        """A layer's under a mode of recomputation."""
        key = (case.recipe.micro_batch_rows, case.layout.cp, case.layout.tp, case.is_sharded, mode)
        if key not in self._layers:
            self._layers[key] = _layer(case, self.cluster, mode)
        return self._layers[key]

    def head(self, case: Case) -> dict[str, float]:
        """Row of ROWS -> seconds of the head."""
        key = (case.recipe.micro_batch_rows, case.layout.cp, case.layout.tp)
        if key not in self._heads:
            self._heads[key] = _NOTHING | _head(case, self.cluster)
        return self._heads[key]


class Pace:
    """The speed of a layout under one recomputation or another: what all of them share is formed once.

    Args:
        case: recipe and layout, whatever the recipe recomputes.
        passes: of the same recipe beyond its layout and rows.
    """

    def __init__(self, case: Case, passes: Passes) -> None:
        self.case, self.cluster, self.passes = case, passes.cluster, passes
        self._layers: dict[str, dict[str, float]] = {}

    def at_least(self, recompute: Recompute) -> float:
        """Seconds, quickly, that no step takes less than: passes and idle time alone, without weights' exchange."""
        case, layout = self.case, self.case.layout
        kept, formed = (self.passes.layer(case, mode).seconds for mode in ("none", recompute.mode))

        def of(layers: int, again: int) -> float:
            return (layers - again) * kept + again * formed

        busy = of(case.most_layers, sum(case.layers_again(recompute, size) for size in case.first_stages))
        smallest = case.stage_sizes[layout.pp - 1]
        idle = (layout.pp - 1) * of(smallest, case.layers_again(recompute, smallest))
        share = ZERO_BUBBLE if case.recipe.parallel.schedule == "zero-bubble" else 1.0
        return (layout.micro_batches * busy + share * idle) * (1 - 1e-9)  # sums in another order

    def speed(self, recompute: Recompute) -> Speed:
        """The time of a step, row by row."""
        case, layout = self.case, self.case.layout
        stages = self._stages(recompute)
        slowest, idle = idle_seconds(stages, layout.pp, case.recipe.parallel.schedule)
        micro = self._micro_batch(case.stages_of(slowest), recompute, has_head=slowest == layout.pp - 1)
        rows = {name: layout.micro_batches * micro[name] + self._of_step[name] for name in ROWS}
        rows["pipeline"] += idle
        rows["host"] += _host(case, self.cluster.device, sum(micro.values()))
        return Speed(rows, case, self.cluster.device.peak_flops * layout.devices)

    def _stages(self, recompute: Recompute) -> list[float]:
        """Seconds of a micro-batch in each stage."""
        sizes = self.case.stage_sizes
        seconds = {size: sum(self._micro_batch([size], recompute, has_head=False).values()) for size in set(sizes)}
        stages = [seconds[size] for size in sizes]
        stages[-1] += sum(self._head.values())
        return stages

    def _micro_batch(self, stages: list[int], recompute: Recompute, *, has_head: bool) -> dict[str, float]:
        """Row of ROWS -> seconds of a micro-batch in stages of so many layers."""
        again = sum(self.case.layers_again(recompute, size) for size in stages)
        keeping = sum(stages) - again
        kept, formed, head = self._layer("none"), self._layer(recompute.mode), self._head
        return {name: keeping * kept[name] + again * formed[name] + has_head * head[name] for name in ROWS}

    def _layer(self, mode: str) -> dict[str, float]:
        if mode not in self._layers:
            layer = self.passes.layer(self.case, mode)
            exchange = _sharding(self.case, self.cluster, layer.forward, layer.backward)
            self._layers[mode] = layer.rows | {"sharding": exchange}
        return self._layers[mode]

    @property
    def _head(self) -> dict[str, float]:
        return self.passes.head(self.case)

    @cached_property
    def _of_step(self) -> dict[str, float]:
        case, cluster = self.case, self.cluster
        return _NOTHING | {
            "pipeline": _sending(case, cluster),
            "update": _update(case, cluster.device),
            "replicas": _replicas(case, cluster),
            "sharding": _ends(case, cluster),
        }


def idle_seconds(stages: list[float], pp: int, schedule: str) -> tuple[int, float]:
    """The slowest rank of a pipeline, and how long that idles in a step.

    It waits for one stage of each other rank to fill and to drain: as torch's schedules order the work this is so to
    the digit where the layers divide evenly, whatever the head takes, and within a fifth where they do not.

    Args:
        stages: seconds of a micro-batch in each, forward and backward; rank r has every pp-th from stage r on.
        pp: pipeline ranks.
        schedule: of the recipe.
    """
    ranks = [sum(stages[rank::pp]) for rank in range(pp)]
    slowest = ranks.index(max(ranks))
    share = ZERO_BUBBLE if schedule == "zero-bubble" else 1.0
    return slowest, share * (sum(stages[:pp]) - stages[slowest])


def exposed_sends(layout: Layout) -> float:
    """Transfers between stages that a step waits for, as torch's schedules order them.

    One stage a rank: a micro-batch's way to the last stage and back is as long as that of the pp in flight. Several:
    the first micro-batch's way and the last one's; the others' transfers hide. Of a zero-bubble pipeline that is rough.
    """
    hops = layout.stages - 1
    if layout.stages_per_rank > 1 or layout.pp == 1:
        return 2 * hops
    return 2 * hops * layout.micro_batches / layout.pp + 2 * (hops - 1)


@dataclass(frozen=True)
class Layer:
    """Seconds of a layer's passes of a micro-batch.

    Attributes:
        rows: row of ROWS -> seconds, weights' exchange left out.
        forward, backward: what that can hide behind.
    """

    rows: dict[str, float]
    forward: float
    backward: float

    @cached_property
    def seconds(self) -> float:
        """Sum of the rows."""
        return sum(self.rows.values())


def _layer(case: Case, cluster: Cluster, recompute: str) -> Layer:
    """A layer's passes under a mode of recomputation."""
    device, config, tp = cluster.device, case.config, case.layout.tp
    R, D, (Q, K, F), c = case.tokens, config.hidden_size, case.widths, case.compute_bytes
    products = 2 * (2 * D * Q + 2 * D * K + 3 * D * F) * R / _product_rate(case, device)
    attention = 2 * Q * case.recipe.sequence_length * R / (_peak(case, device) * device.attention_share)
    numbers = 46 * D / tp + 18 * (Q + K) + 5 * F  # read and written in eager mode, in the compute dtype
    elements = c * numbers * R * (FUSED if case.recipe.compile else 1) / _memory_rate(device)
    forward = products + attention + elements
    kernels = KERNELS[case.recipe.compile] + TENSOR_PARALLEL_KERNELS * (tp > 1) + SHARDING_KERNELS * case.is_sharded
    waits = max(0.0, kernels * KERNEL_SECONDS - forward)
    whole = forward + waits
    again = {"none": 0.0, "selective": elements, "block": whole, "offload": whole}[recompute]
    rows = {"products": 3 * products, "attention": 3.5 * attention, "memory-bound": 3 * (elements + waits),
            "recomputation": again}  # fmt: skip
    if recompute == "offload":  # out beside the forward pass, and back while the backward pass waits
        carried = c * D * R / tp / (device.host_rate * 1e9 * LINK_SHARE)
        rows["host"] = carried + max(0.0, carried - forward)
    times = 1 if recompute == "none" else 2
    if tp > 1:  # two gathers and two sums forward, as many backward, and forward again
        rows["tensor parallel"] = 4 * (1 + times) * cluster.seconds(c * D * R, tp, 1)
    if case.layout.cp > 1:
        rows["context parallel"] = (1 + times) * _context(case, cluster)
    backward = 2 * (products + elements + waits) + 2.5 * attention + again
    return Layer(_NOTHING | rows, whole, backward)


def _head(case: Case, cluster: Cluster) -> dict[str, float]:
    """Seconds of the head on the last stage."""
    V, D, R = case.config.vocab_size / case.layout.tp, case.config.hidden_size, case.tokens
    return {
        "products": 6 * V * D * R / _product_rate(case, cluster.device),
        "memory-bound": 30 * V * R / _memory_rate(cluster.device),
        "tensor parallel": 2 * cluster.seconds(case.compute_bytes * D * R, case.layout.tp, 1),
    }


def _context(case: Case, cluster: Cluster) -> float:
    """Seconds of one pass's exchange of a layer."""
    cp, tp, R, c = case.layout.cp, case.layout.tp, case.tokens, case.compute_bytes
    Q, K, _ = case.widths
    if case.exchanges_heads:
        return 4 * cluster.seconds(c * (2 * Q + 2 * K) * R / 4, cp, tp)
    return 2 * cluster.seconds(c * K * R * cp, cp, tp)


def _sharding(case: Case, cluster: Cluster, forward: float, backward: float) -> float:
    """Seconds of a layer's gathers and sums in a micro-batch that its passes do not hide."""
    layout = case.layout
    gather, scatter = _exchanges(case, cluster, case.weights.part("layer", layout.tp, 1).gathered)
    if layout.pp > 1:
        return _exposed(gather, backward) if case.gathers > 1 else 0.0
    back = scatter + (gather if case.recipe.parallel.reshards else 0)
    return _exposed(gather, forward) + _exposed(back, backward)


def _exchanges(case: Case, cluster: Cluster, weights: float) -> tuple[float, float]:
    """Seconds of a gather of so many sharded weights, and of a sum of their gradients."""
    layout = case.layout
    gather = cluster.seconds(case.compute_bytes * weights, layout.shard_size, layout.tp)
    return gather, cluster.seconds(4 * weights, layout.shard_size, layout.tp)


def _exposed(transfer: float, behind: float) -> float:
    return transfer - min(OVERLAP * transfer, behind)


def _ends(case: Case, cluster: Cluster) -> float:
    """Seconds of gathers and sums that nothing hides: of what lies outside layers; in pipelines the last, of all."""
    layout = case.layout
    parts = {kind: case.weights.part(kind, layout.tp, 1).gathered for kind in ("embedding", "head", "layer")}
    weights = (parts["embedding"] + parts["head"]) / min(2, layout.pp)
    if layout.pp > 1:
        weights += case.most_layers * parts["layer"]
    return case.sums * sum(_exchanges(case, cluster, weights))


def _replicas(case: Case, cluster: Cluster) -> float:
    """Seconds of the sums over dp_replicate, once a step unless gradients leave after each; half hides."""
    layout = case.layout
    own = case.most_layers * case.weights.part("layer", layout.tp, layout.shard_size).own
    times = case.sums if case.recipe.optimizer.in_backward else 1
    return times * cluster.seconds(2 * 4 * own, layout.dp_replicate, layout.tp * layout.shard_size) / 2


def _sending(case: Case, cluster: Cluster) -> float:
    """Seconds that a step waits for what stages send."""
    layout = case.layout
    stride = layout.devices // layout.pp
    return exposed_sends(layout) * cluster.seconds(2 * case.stream_bytes, 2, stride)


def _host(case: Case, device: Profile, micro: float) -> float:
    """Seconds that gradients take to the host and back beyond what the passes hide."""
    if not case.has_gradients_on_host:
        return 0.0
    m = case.layout.micro_batches
    own = case.weights.weight_bytes * _own(case)
    pass_ = own / (device.host_rate * 1e9 * LINK_SHARE)
    hidden = 0.6 * micro  # the backward pass
    return (
        sum(max(0.15 * passes * pass_, passes * pass_ - hidden) * times for passes, times in ((1, 1), (2, m - 1)))
        + pass_
    )


def _update(case: Case, device: Profile) -> float:
    if device.has_update_kernel:
        layer = case.weights.part("layer", case.layout.tp, case.layout.shard_size)
        moved = 3 * case.weights.weight_bytes + 2 * layer.state / layer.own  # weight and state both ways, gradient
        return moved * _own(case) / (device.memory_rate * 1e9 * UPDATE_SHARE)
    bits = case.recipe.optimizer.state_bits
    kind = "codes" if bits < 32 else "fp32" if case.weights.weight_bytes == 4 else "bf16"
    return UPDATE_BYTES[kind] * _own(case) / _memory_rate(device)


def _own(case: Case) -> float:
    """Weights of the rank that holds most layers."""
    layout = case.layout
    parts = {kind: case.weights.part(kind, layout.tp, layout.shard_size).own for kind in ("layer", "embedding", "head")}
    return case.most_layers * parts["layer"] + (
        parts["embedding"] if layout.pp > 1 else parts["embedding"] + parts["head"]
    )


def _product_rate(case: Case, device: Profile) -> float:
    share = device.matmul_share * case.tokens / (case.tokens + HALF_RATE_TOKENS)
    return _peak(case, device) * share


def _peak(case: Case, device: Profile) -> float:
    return device.peak_flops if case.compute_bytes == 2 else device.fp32_flops


def _memory_rate(device: Profile) -> float:
    return device.memory_rate * 1e9 * MEMORY_SHARE
