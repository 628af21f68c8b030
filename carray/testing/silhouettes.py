"""Draws vehicles in side view from silhouettes: paint, glass, wheels and shadow on a canvas.

From: a class of SILHOUETTES, a place and a random generator. To: pixels on the canvas that is handed in.
Invariants: classes differ in silhouette only; paint and wobble are drawn from the same distributions for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["SILHOUETTES", "Silhouette", "draw_vehicle", "place_vehicle", "shade"]

Pixels = npt.NDArray[np.uint8]
Points = Sequence[tuple[float, float]]
Colour = tuple[float, float, float]
Corners = npt.NDArray[np.int32]
"""Pixels x, y of a polygon or a line, shape points x 2."""
Place = Callable[[Points], Corners]


@dataclass(frozen=True, slots=True)
class Silhouette:
    """A silhouette in units of the car's length: x from rear 0 to front 1, y from the ground up."""

    rear: Points
    """The outline, from below the rear bumper over the roof; `front` goes on from there, back to below the middle."""
    front: Points
    panes: Sequence[Points]
    wheels: tuple[float, float, float]
    """x of the rear and of the front axle, and the radius."""
    doors: Sequence[float]
    """x of the gaps beside doors."""
    shoulder: float
    """Height of the highlight along the side."""
    lines: Sequence[Points] = ()
    """Roof rails, a windscreen's frame, the rim of a cargo bed."""
    seats: Sequence[tuple[float, float]] = ()


SILHOUETTES = {
    "Alder Crest Sedan 2012": Silhouette(
        rear=[(0.01, 0.06), (0, 0.13), (0.015, 0.2), (0.17, 0.222), (0.3, 0.295), (0.41, 0.31), (0.53, 0.3)],
        front=[(0.68, 0.215), (0.86, 0.193), (0.955, 0.165), (0.995, 0.12), (0.99, 0.05), (0.5, 0.045)],
        panes=[
            [(0.22, 0.222), (0.31, 0.28), (0.415, 0.293), (0.415, 0.218)],
            [(0.435, 0.218), (0.435, 0.293), (0.525, 0.283), (0.635, 0.214)],
        ],
        wheels=(0.19, 0.8, 0.074),
        doors=(0.27, 0.425, 0.625),
        shoulder=0.186,
    ),
    "Alder Crest Hatchback 2009": Silhouette(
        rear=[(0.01, 0.06), (0, 0.14), (0.01, 0.23), (0.09, 0.335), (0.2, 0.362), (0.4, 0.365), (0.54, 0.345)],
        front=[(0.72, 0.24), (0.9, 0.21), (0.975, 0.17), (1, 0.12), (0.99, 0.055), (0.5, 0.05)],
        panes=[
            [(0.09, 0.25), (0.13, 0.325), (0.225, 0.343), (0.225, 0.246)],
            [(0.245, 0.246), (0.245, 0.345), (0.405, 0.347), (0.405, 0.242)],
            [(0.425, 0.242), (0.425, 0.346), (0.53, 0.329), (0.67, 0.24)],
        ],
        wheels=(0.18, 0.82, 0.088),
        doors=(0.235, 0.415, 0.665),
        shoulder=0.212,
    ),
    "Birch Ridge SUV 2012": Silhouette(
        rear=[(0.01, 0.09), (0, 0.17), (0.005, 0.27), (0.045, 0.37), (0.1, 0.392), (0.35, 0.398), (0.56, 0.385)],
        front=[(0.685, 0.272), (0.9, 0.25), (0.985, 0.225), (1, 0.15), (0.99, 0.08), (0.5, 0.075)],
        panes=[
            [(0.045, 0.275), (0.08, 0.368), (0.2, 0.376), (0.2, 0.27)],
            [(0.22, 0.27), (0.22, 0.376), (0.385, 0.378), (0.385, 0.268)],
            [(0.405, 0.268), (0.405, 0.377), (0.55, 0.366), (0.655, 0.268)],
        ],
        wheels=(0.19, 0.81, 0.095),
        doors=(0.21, 0.395, 0.645),
        shoulder=0.235,
        lines=[[(0.12, 0.408), (0.5, 0.41)]],
    ),
    "Birch Hauler Crew Cab 2007": Silhouette(
        rear=[(0.005, 0.085), (0, 0.15), (0.005, 0.232), (0.2, 0.233), (0.375, 0.234), (0.385, 0.33), (0.43, 0.352)],
        front=[(0.6, 0.347), (0.7, 0.243), (0.9, 0.228), (0.985, 0.2), (1, 0.14), (0.99, 0.08), (0.5, 0.075)],
        panes=[
            [(0.41, 0.24), (0.41, 0.32), (0.44, 0.334), (0.5, 0.334), (0.5, 0.238)],
            [(0.52, 0.238), (0.52, 0.334), (0.59, 0.33), (0.675, 0.238)],
        ],
        wheels=(0.19, 0.81, 0.086),
        doors=(0.378, 0.51, 0.67),
        shoulder=0.205,
        lines=[[(0.005, 0.24), (0.37, 0.241)]],
    ),
    "Cedar Courier Van 2010": Silhouette(
        rear=[(0.005, 0.07), (0, 0.2), (0.01, 0.41), (0.04, 0.44), (0.3, 0.455), (0.66, 0.452), (0.76, 0.43)],
        front=[(0.89, 0.285), (0.965, 0.24), (0.995, 0.18), (0.995, 0.065), (0.5, 0.058)],
        panes=[[(0.63, 0.285), (0.63, 0.405), (0.745, 0.4), (0.845, 0.285)]],
        wheels=(0.19, 0.81, 0.072),
        doors=(0.3, 0.605, 0.84),
        shoulder=0.22,
        lines=[[(0.05, 0.25), (0.6, 0.25)]],
    ),
    "Larch Breeze Convertible 2012": Silhouette(
        rear=[(0.01, 0.055), (0, 0.11), (0.02, 0.182), (0.12, 0.215), (0.27, 0.226), (0.33, 0.207), (0.46, 0.203)],
        front=[(0.6, 0.212), (0.76, 0.198), (0.93, 0.165), (0.995, 0.115), (0.985, 0.05), (0.5, 0.045)],
        panes=[[(0.525, 0.207), (0.525, 0.25), (0.56, 0.258), (0.635, 0.205)]],
        wheels=(0.18, 0.81, 0.078),
        doors=(0.35, 0.6),
        shoulder=0.17,
        lines=[[(0.64, 0.205), (0.55, 0.29), (0.535, 0.288)]],
        seats=[(0.36, 0.235), (0.46, 0.235)],
    ),
}
"""Class names in the grammar of Stanford Cars, and their silhouettes; one make and one model occur twice."""

_PAINTS = [(178, 24, 32), (28, 66, 140), (236, 236, 232), (38, 40, 44), (160, 166, 172), (214, 148, 28)]
_PAINTS += [(30, 100, 70), (96, 28, 60), (92, 120, 150), (196, 188, 164), (226, 92, 30), (90, 70, 52)]


def place_vehicle(rng: np.random.Generator, centre: float, ground: float, length: float) -> Place:
    """Make the map from a silhouette's units to pixels: direction, stance and a slight tilt."""
    direction = 1 if rng.random() < 0.5 else -1
    tall, tilt = rng.uniform(0.95, 1.05), rng.uniform(-0.025, 0.025)

    def place(points: Points) -> Corners:
        x, y = np.asarray(points, dtype=np.float64).T
        across, up = direction * (x - 0.5) * length, y * tall * length
        turned_x = centre + across * np.cos(tilt) - up * np.sin(tilt)
        turned_y = ground - up * np.cos(tilt) - across * np.sin(tilt)
        return np.stack([turned_x, turned_y], axis=1).round().astype(np.int32)

    return place


def draw_vehicle(canvas: Pixels, rng: np.random.Generator, shape: Silhouette, place: Place, length: float) -> None:
    """Paint one vehicle onto `canvas`, uint8_HWC RGB, in place; `length` is its length in pixels."""
    paint = shade(_PAINTS[rng.integers(len(_PAINTS))], rng.uniform(0.9, 1.1))
    outline_N2 = np.array([*shape.rear, *shape.front])
    outline_N2 += rng.normal(0, 0.003, outline_N2.shape)
    glass = shade((70, 88, 104), rng.uniform(0.45, 1.25))
    turn = rng.uniform(0, 1)
    thin = max(1, int(length * 0.006))
    _draw_shadow(canvas, place, length)
    for seat in shape.seats:
        _draw_seat(canvas, place, seat, length)
    _fill_body(canvas, place(_round_off(outline_N2)), paint)
    for points in shape.lines:
        _stroke(canvas, place(points), shade(paint, 0.55), 2 * thin)
    for pane in shape.panes:
        _draw_pane(canvas, place, pane, glass, thin)
    _draw_side(canvas, place, shape, paint, thin)
    for axle in shape.wheels[:2]:
        (x, y), (_, top) = place([(axle, shape.wheels[2]), (axle, 2 * shape.wheels[2])]).tolist()
        _draw_wheel(canvas, (x, y), max(4, abs(y - top)), turn, paint)


def shade(colour: Sequence[float], light: float, *, add: float = 0) -> Colour:
    """Make a colour lighter or darker."""
    red, green, blue = (float(min(255, max(0, value * light + add))) for value in colour)
    return red, green, blue


def _stroke(canvas: Pixels, corners: Corners, colour: Colour, thickness: int) -> None:
    import cv2

    cv2.polylines(canvas, [corners], False, colour, thickness, cv2.LINE_AA)


def _draw_shadow(canvas: Pixels, place: Place, length: float) -> None:
    import cv2

    mask_HW = np.zeros(canvas.shape[:2], dtype=np.uint8)
    corners = place([(0.0, -0.02), (0.04, 0.05), (0.96, 0.05), (1.0, -0.02), (0.9, -0.035), (0.1, -0.035)])
    cv2.fillPoly(mask_HW, [corners], 150)
    softness = max(3, int(length * 0.05))
    _blend(canvas, np.asarray(cv2.blur(mask_HW, (softness, softness)), dtype=np.uint8), np.zeros((canvas.shape[0], 3)))


def _draw_seat(canvas: Pixels, place: Place, seat: tuple[float, float], length: float) -> None:
    import cv2

    centre = place([seat])[0].tolist()
    cv2.ellipse(canvas, (centre, (length * 0.035, length * 0.075), 8), (58, 46, 42), -1)


def _fill_body(canvas: Pixels, outline: Corners, paint: Colour) -> None:
    """Fill the body, light on its upper faces and dark below, as sky and road colour it."""
    import cv2

    mask_HW = np.zeros(canvas.shape[:2], dtype=np.uint8)
    cv2.fillPoly(mask_HW, [outline], 255, cv2.LINE_AA)
    top, bottom = int(outline[:, 1].min()), int(outline[:, 1].max())
    light_H = np.interp(np.arange(canvas.shape[0]), [top, top + 0.45 * (bottom - top), bottom], [1.25, 1.0, 0.55])
    _blend(canvas, mask_HW, np.clip(light_H[:, None] * np.asarray(paint), 0, 255))


def _blend(canvas: Pixels, mask_HW: Pixels, colour_HC: npt.NDArray[np.float64]) -> None:
    """Lay a colour a row over the canvas where the mask says so, touching no more than the mask's rows."""
    rows = np.flatnonzero(mask_HW.any(axis=1))
    if not len(rows):
        return
    part = slice(rows[0], rows[-1] + 1)
    share_HW1 = (mask_HW[part].astype(np.float32) / 255)[:, :, None]
    canvas[part] = canvas[part] * (1 - share_HW1) + colour_HC[part, None].astype(np.float32) * share_HW1


def _draw_pane(canvas: Pixels, place: Place, pane: Points, glass: Colour, thin: int) -> None:
    import cv2

    cv2.fillPoly(canvas, [place(pane)], glass, cv2.LINE_AA)
    (x1, y1), (x2, y2) = pane[0], pane[1]
    _stroke(canvas, place([(x1 + 0.02, y1 + 0.01), (x2 + 0.025, y2 - 0.015)]), shade(glass, 1.5), thin)


def _draw_side(canvas: Pixels, place: Place, shape: Silhouette, paint: Colour, thin: int) -> None:
    """Draw the gaps beside doors, their handles, the highlight along the shoulder, and the lamps."""
    import cv2

    shoulder = shape.shoulder
    for x in shape.doors:
        _stroke(canvas, place([(x, shoulder + 0.03), (x, 0.09)]), shade(paint, 0.6), thin)
        handle = place([(x - 0.05, shoulder - 0.012), (x - 0.02, shoulder - 0.012)])
        _stroke(canvas, handle, shade(paint, 0.5), 2 * thin)
    _stroke(canvas, place([(0.04, shoulder), (0.93, shoulder - 0.012)]), shade(paint, 1.35, add=20), thin)
    y = shoulder - 0.03
    head = [(0.93, y + 0.01), (0.985, y), (0.98, y - 0.03), (0.945, y - 0.022)]
    tail = [(0.006, y + 0.03), (0.035, y + 0.03), (0.03, y - 0.02), (0.006, y - 0.02)]
    cv2.fillPoly(canvas, [place(head)], (244, 240, 214), cv2.LINE_AA)
    cv2.fillPoly(canvas, [place(tail)], (196, 30, 28), cv2.LINE_AA)


def _draw_wheel(canvas: Pixels, centre: tuple[int, int], radius: int, turn: float, paint: Colour) -> None:
    import cv2

    for size, colour in ((1.2, shade(paint, 0.3)), (1.0, (28, 28, 30)), (0.66, (172, 174, 178))):
        cv2.circle(canvas, centre, int(radius * size), colour, -1, cv2.LINE_AA)
    for spoke in range(5):
        angle = 2 * np.pi * (spoke + turn) / 5
        reach = 0.62 * radius * np.array([np.cos(angle), np.sin(angle)])
        _stroke(canvas, np.array([centre, centre + reach], dtype=np.int32), (84, 86, 90), max(2, radius // 7))
    cv2.circle(canvas, centre, max(2, radius // 6), (200, 202, 204), -1, cv2.LINE_AA)


def _round_off(points_N2: npt.NDArray[np.float64]) -> Points:
    """Round a closed polygon by cutting its corners twice (Chaikin, 1974)."""
    for share in (0.2, 0.25):
        following_N2 = np.roll(points_N2, -1, axis=0)
        near_N2 = points_N2 * (1 - share) + following_N2 * share
        far_N2 = points_N2 * share + following_N2 * (1 - share)
        points_N2 = np.stack([near_N2, far_N2], axis=1).reshape(-1, 2)
    return [(float(x), float(y)) for x, y in points_N2]
