"""Quantises networks to 8-bit integers, and finds the layers that must stay in floats for the labels to stay.

Quantisation is static (QDQ), with unsigned activations and signed weights (U8S8: 1.5 times as fast as S8S8 on a CPU
with VNNI), a scale for each output channel, and BatchNorm folded into its convolution. A range of activations is the
mean of the extremes of batches of 8 images: as many labels of 894 validation images agree (95.6 %) as with the 99.99th
percentile at twice the cost; with the extremes of all images 94.3 %. The first layers and the head stay in floats
(93 % without).

Only layers with constant weights are quantised. The outputs of the int8 network are shifted by a constant, so that
their mean over calibration images is that of fp32: what rounding adds to every image alike costs labels, too.

Where that loses too much, `search_floats` leaves blocks in floats as well. A block is what lies between two tensors
through which everything flows: a residual unit, or a layer between two of them. Calibration images alone say which
blocks go first (those whose quantisation moves fp32's logits most) and how many (until the logits are nearer to fp32's
by the factor by which a limit was missed). Then the judging images are asked, at most `LOOKS` times, each time about a
network that is nearer by a fifth or more and meant to stay a tenth below the limits. So the certificate is that of the
first of few networks to pass, which is a little better luck than one look; `carray evaluate` on the test split shows
how much. All looks are in the certificate.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.bundle.bundle_folder import FloatSearch, FloatStep
from carray.bundle.runtimes import OnnxRuntime, check_graph
from carray.core.progress import say
from carray.search.train.export import quiet

__all__ = ["CALIBRATION", "Judged", "Quantiser", "as_batches", "order_by_worth", "search_floats"]

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

BATCH_IMAGES = 8
CALIBRATION = f"mean of the extremes of batches of {BATCH_IMAGES}; outputs shifted to fp32's mean"
SHIFT_IMAGES = 128
"""Calibration images that the shift of the outputs is measured on."""
FLOAT_CONVOLUTIONS = 3
"""The stem, and the first depthwise and pointwise convolution: in floats, 1.5 points more agreement of Lite0."""
KINDS = ("Conv", "Gemm", "MatMul")
"""Layers with constant weights that are quantised, and nothing else: sums, products of activations (as in attention),
normalisation and softmax cost labels in integers, and no time in floats (results/LOG.md)."""
MERGED = ("Clip", "Relu")
"""What becomes part of the layer before it, whose range is that of what these leave of it."""
SEARCH_SECONDS = 150.0
"""CPU time of a search, at most; half of it to order the blocks."""
SEARCH_IMAGES = 32
"""Calibration images that the blocks are ordered by."""
CONVERSION = 3
"""What a stretch in floats costs besides its layers, in layers: tensors are converted and laid out anew, twice."""
LOOKS = 4
"""Networks that are compared on the judging images, at most, besides the one with all blocks in integers."""
LEAST_SPEEDUP = 1.5
"""Of a network with blocks in floats over fp32; a slower one is not worth its loss."""
MARGIN, LEAST_STEP = 0.9, 0.8
"""What the next network's distance from fp32 is meant to be: of the limit, and at most of the last one's."""


class Quantiser:
    """A network with calibrated ranges of activations, from which int8 networks are made without calibrating again."""

    def __init__(self, model: bytes, views_NHWC: Pixels) -> None:
        """Fold BatchNorm into convolutions, and calibrate on uint8 inputs.

        Cost: about 7 s for EfficientNet-Lite0 at 160 pixels and 256 images.

        Raises:
            BundleError: the bytes are no ONNX, or refer to other files.
        """
        import onnx
        from onnxruntime.quantization import CalibrationMethod, create_calibrator
        from onnxruntime.quantization.shape_inference import quant_pre_process

        check_graph(model)
        with tempfile.TemporaryDirectory() as folder, quiet(""):
            plain, folded, observed = (str(Path(folder) / f"{name}.onnx") for name in ("plain", "folded", "observed"))
            Path(plain).write_bytes(model)
            quant_pre_process(plain, folded, skip_symbolic_shape=True)
            calibrator = create_calibrator(
                Path(folded),
                [*KINDS, *MERGED],
                augmented_model_path=observed,
                calibrate_method=CalibrationMethod.MinMax,
                extra_options={"moving_average": True},
            )
            calibrator.collect_data(_CalibrationReader(views_NHWC))
            self._ranges = calibrator.compute_data()
            self._folded = onnx.load(folded)
        self._shift_NHWC = _spread(views_NHWC, SHIFT_IMAGES)
        self._fp32_means = _means(OnnxRuntime(model, threads=1), self._shift_NHWC)
        graph = self._folded.graph
        constants = {constant.name for constant in graph.initializer}
        self._candidates = {node.name for node in graph.node if node.op_type in KINDS}
        layers = [node for node in graph.node if node.op_type in KINDS and node.input[1] in constants]
        convolutions = [node.name for node in layers if node.op_type == "Conv"]
        head = [node.name for node in layers if node.op_type != "Conv"][-1:]
        some = {node.name for node in layers}.difference(convolutions[:FLOAT_CONVOLUTIONS], head)
        self._always_float = self._candidates - some
        self.blocks = _blocks(graph, some)
        """The names of each block's layers, in the network's order."""

    def quantise(self, *, in_float: Collection[str] = ()) -> bytes:
        """Quantise all layers but the first ones, the head and those named; inputs and outputs stay the same.

        Cost: 1 to 2 s.
        """
        network = self._quantise(self._always_float.union(in_float))
        means = _means(OnnxRuntime(network.SerializeToString(), threads=1), self._shift_NHWC)
        _shift_outputs(network.graph, {name: mean - means[name] for name, mean in self._fp32_means.items()})
        return bytes(network.SerializeToString())

    def quantise_only(self, layers: Collection[str]) -> bytes:
        """Quantise no other layers than those named. Cost: 0.1 s for a block."""
        network = self._quantise(self._candidates.difference(layers))
        return bytes(network.SerializeToString())

    def _quantise(self, in_float: Collection[str]) -> Any:
        import onnx
        from onnxruntime.quantization import QDQQuantizer, QuantType

        network = onnx.ModelProto()
        network.CopyFrom(self._folded)  # the quantizer changes it
        with quiet(""):
            quantizer = QDQQuantizer(
                network,
                True,  # a scale for each output channel
                False,  # all of the weights' 8 bits
                QuantType.QInt8,
                QuantType.QUInt8,
                self._ranges,
                [],
                sorted(in_float),
                [*KINDS, *MERGED],
                {},
            )
            quantizer.quantize_model()
        return quantizer.model.model


class _CalibrationReader:
    """Calibration images in batches, with the interface of onnxruntime's CalibrationDataReader."""

    def __init__(self, views_NHWC: Pixels) -> None:
        self._batches = iter(as_batches(views_NHWC))

    def get_next(self) -> dict[str, Any] | None:
        return next(({"pixels": batch} for batch in self._batches), None)


def as_batches(pixels_NHWC: Pixels) -> list[Pixels]:
    """Cut images into batches of eight."""
    return [pixels_NHWC[i : i + BATCH_IMAGES] for i in range(0, len(pixels_NHWC), BATCH_IMAGES)]


def _spread(views_NHWC: Pixels, count: int) -> Pixels:
    """Give that many images, evenly spaced, or all."""
    return views_NHWC[np.unique(np.linspace(0, len(views_NHWC) - 1, count).astype(int))]


def _means(runtime: OnnxRuntime, views_NHWC: Pixels) -> dict[str, Floats]:
    """Compute the mean of each output over images."""
    scored = [runtime.score(batch) for batch in as_batches(views_NHWC)]
    outputs = zip(("logits", "embedding"), zip(*scored, strict=True), strict=True)
    return {name: np.concatenate(parts).mean(axis=0) for name, parts in outputs}


def _shift_outputs(graph: Any, shifts: dict[str, Floats]) -> None:
    """Add a constant to outputs of a network; what reads such a tensor inside it does so before."""
    from onnx import helper, numpy_helper

    for name, shift in shifts.items():
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [f"{name}_unshifted" if other == name else other for other in names]
        graph.initializer.append(numpy_helper.from_array(shift, f"{name}_shift"))
        graph.node.append(helper.make_node("Add", [f"{name}_unshifted", f"{name}_shift"], [name], f"{name}_shift"))


def _blocks(graph: Any, layers: set[str]) -> list[list[str]]:
    """Cut the named layers wherever all that follows depends on one tensor alone."""
    last_use = {name: place for place, node in enumerate(graph.node) for name in node.input}
    blocks, block = list[list[str]](), list[str]()
    flowing, alive = set[str](), set[str]()  # tensors that depend on a layer; those still needed
    for place, node in enumerate(graph.node):
        block += [node.name] * (node.name in layers)
        if (node.name in layers or flowing.intersection(node.input)) and node.op_type != "Shape":
            flowing.update(node.output)
            alive.update(node.output)
        alive = {name for name in alive if last_use.get(name, -1) > place}
        if block and len(alive) <= 1:
            blocks.append(block)
            block = []
    return [*blocks, block] if block else blocks


@dataclass(frozen=True)
class Judged:
    """How an int8 network compares with fp32 on the judging images."""

    figures: dict[str, Any]
    """The figures of a certificate."""
    excess: float
    """How far it must come nearer to fp32 for the certificate to hold; at most 1 if it does."""


def search_floats(
    quantiser: Quantiser,
    fp32: OnnxRuntime,
    views_NHWC: Pixels,
    *,
    plain: Judged,
    judge: Callable[[OnnxRuntime], Judged],
    measure_rate: Callable[[OnnxRuntime], float],
) -> tuple[Judged | None, FloatSearch]:
    """Find blocks that must stay in floats for the certificate to hold, at 1.5 times fp32's images a second or more.

    Args:
        quantiser: The network.
        fp32: The same network in floats.
        views_NHWC: Calibration images, uint8.
        plain: How the network with all blocks in integers compares, which misses the certificate.
        judge: Compares a network with fp32 on the judging images.
        measure_rate: Measures images a second.

    Returns:
        How the first network that holds compares, or None without one; and the search's trace, with the nodes to leave
        in floats.
    """
    search = _Search(quantiser, fp32, views_NHWC, measure_rate)
    try:
        found, ended = search.run(plain, judge)
    except _OutOfTime:
        found, ended = None, f"the search's time, {SEARCH_SECONDS:.0f} s of a core, was up"
    return found, search.trace(ended, in_float=search.nodes(search.steps[-1].blocks_in_float) if found else [])


class _OutOfTime(Exception):
    """The time of a search is up."""


class _Search:
    """The state of `search_floats`; a network is named by how many blocks it has in floats."""

    def __init__(
        self,
        quantiser: Quantiser,
        fp32: OnnxRuntime,
        views_NHWC: Pixels,
        measure_rate: Callable[[OnnxRuntime], float],
    ) -> None:
        self.steps: list[FloatStep] = []
        self._quantiser, self._fp32, self._measure_rate = quantiser, fp32, measure_rate
        self._views_NHWC = _spread(views_NHWC, SEARCH_IMAGES)
        self._fp32_NK = _logits(fp32, self._views_NHWC)
        self._started = time.thread_time()
        self._tried: dict[str, float] = {}
        self._order: list[list[str]] = []
        self._distances: dict[int, float] = {}
        self._speedups: dict[int, float] = {}
        self._latest: tuple[int, OnnxRuntime] | None = None

    def run(self, plain: Judged, judge: Callable[[OnnxRuntime], Judged]) -> tuple[Judged | None, str]:
        """Look for a network that holds; gives how it compares, if there is one, and why the search ended."""
        self._fp32_rate = self._measure_rate(self._fp32)
        if self._note(0, plain).times_fp32 < LEAST_SPEEDUP:
            return None, f"int8 is less than {LEAST_SPEEDUP} times as fast as fp32 here"
        self._order_blocks()
        judged, count, slow = plain, 0, False
        for _ in range(LOOKS):
            following = self._first_nearer(count, min(LEAST_STEP, MARGIN / judged.excess))
            if slow := self._speedup(following) < LEAST_SPEEDUP:
                following = self._last_fast(count, following)
            if following == count:
                break
            count, judged = following, judge(self._network(following))
            step = self._note(count, judged)
            say(
                f"bundle: int8 with {count} of {len(self._order)} blocks in floats: labels agree on "
                f"{step.agreement:.1%}, {step.times_fp32:.1f} times as fast as fp32"
            )
            if judged.figures["holds"]:
                return judged, "the certificate holds"
            if slow or count == len(self._order):
                break
        more = f"with more it would be less than {LEAST_SPEEDUP} times as fast as fp32" if slow else "it was too little"
        return None, f"{count} of {len(self._quantiser.blocks)} blocks in floats were not enough, and {more}"

    def nodes(self, count: int) -> list[str]:
        """Name the layers of the first blocks in order."""
        return list(chain.from_iterable(self._order[:count]))

    def trace(self, ended: str, *, in_float: list[str]) -> FloatSearch:
        """Give the certificate's record of the search."""
        return FloatSearch(
            in_float=in_float,
            blocks=len(self._quantiser.blocks),
            tried=self._tried,
            steps=self.steps,
            ended=ended,
            cpu_seconds=round(self._seconds(), 1),
        )

    def _seconds(self) -> float:
        return time.thread_time() - self._started  # it runs on this thread alone, beside whatever else runs here

    def _order_blocks(self) -> None:
        """Order the blocks by how far each moves the logits if only it is quantised, and by its cost in floats."""
        blocks = self._quantiser.blocks
        for block in blocks:
            if self._seconds() > SEARCH_SECONDS / 2:
                break
            network = OnnxRuntime(self._quantiser.quantise_only(block), threads=1)
            moved_NK = _logits(network, self._views_NHWC) - self._fp32_NK
            self._tried[block[0]] = _rms(moved_NK - moved_NK.mean(axis=0))
        gains = [self._tried.get(block[0], 0.0) ** 2 for block in blocks]
        self._order = [blocks[i] for i in order_by_worth(gains, [len(block) for block in blocks])]

    def _network(self, count: int) -> OnnxRuntime:
        if self._latest is None or self._latest[0] != count:
            if self._seconds() > SEARCH_SECONDS:
                raise _OutOfTime
            model = self._quantiser.quantise(in_float=self.nodes(count))
            self._latest = count, OnnxRuntime(model, threads=1)
        return self._latest[1]

    def _first_nearer(self, count: int, factor: float) -> int:
        """Find the first network that is nearer to fp32 than this one by a factor, or the one with all in floats."""
        wanted = factor * self._distance(count)
        return _first(range(count + 1, len(self._order)), lambda n: self._distance(n) <= wanted)

    def _last_fast(self, count: int, slow: int) -> int:
        return _first(range(count + 1, slow), lambda n: self._speedup(n) < LEAST_SPEEDUP) - 1

    def _distance(self, count: int) -> float:
        """Measure the RMS difference from fp32's logits on the calibration images."""
        if count not in self._distances:
            self._distances[count] = _rms(_logits(self._network(count), self._views_NHWC) - self._fp32_NK)
        return self._distances[count]

    def _speedup(self, count: int) -> float:
        if count not in self._speedups:
            self._speedups[count] = self._measure_rate(self._network(count)) / self._fp32_rate
        return self._speedups[count]

    def _note(self, count: int, judged: Judged) -> FloatStep:
        figures = {name: judged.figures[name] for name in ("agreement", "agreement_confident", "drop_points")}
        distance, speedup = self._distance(count), self._speedup(count)
        step = FloatStep(blocks_in_float=count, rms=distance, times_fp32=round(speedup, 2), **figures)
        self.steps.append(step)
        return step


def order_by_worth(gains: Sequence[float], layers: Sequence[int]) -> list[int]:
    """Order neighbouring blocks to be left in floats: at each step the one with the largest gain for its cost.

    A block costs its layers, and `CONVERSION` more where it stands between integers, less where it joins two others.
    What comes before the first and after the last one is in floats.
    """
    in_float, order = {-1, len(gains)}, list[int]()
    while waiting := [block for block in range(len(gains)) if block not in in_float]:
        costs = {i: layers[i] + CONVERSION * (1 - len(in_float & {i - 1, i + 1})) for i in waiting}
        best = max(waiting, key=lambda block: gains[block] / max(costs[block], 1))
        order.append(best)
        in_float.add(best)
    return order


def _first(counts: range, holds: Callable[[int], bool]) -> int:
    """Find the first count for which it holds, as it does for all after it; the range's end if for none."""
    low, high = counts.start, counts.stop
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _logits(runtime: OnnxRuntime, views_NHWC: Pixels) -> Floats:
    return np.concatenate([runtime.score(batch)[0] for batch in as_batches(views_NHWC)])


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
