"""The capsule figure: joints from a pose, then body, head and arms drawn over each other."""

import math
from dataclasses import replace

from PIL import Image, ImageDraw

from .backdrop import SUPERSAMPLING, Color, shade
from .looks import BLACK, HATS, LOOKS, SHIRTS, SKIN, Look
from .vocabulary import HAT, NONE, POINTED_HAT, STRIPED, Character

FIGURE_SCALE = 1.04
WHITE = (250, 250, 250)
Point = tuple[float, float]


def joints(character: Character) -> dict[str, Point]:
    """Joint positions in figure units before the body's rotation: pelvis at the origin, y downwards."""
    look = LOOKS[character.subject]
    pose = character.pose
    places = {"pelvis": (0.0, 0.0), "neck": (0.0, -look.torso_height), "head": (0.0, head_height(look))}
    for name, side, (upper_arm, lower_arm), (upper_leg, lower_leg) in (
        ("left", -1, pose.arms[:2], pose.legs[:2]),
        ("right", 1, pose.arms[2:], pose.legs[2:]),
    ):
        shoulder = (side * (look.torso_width / 2 - 0.5), -look.torso_height + 2.0)
        elbow = _step(shoulder, upper_arm, side, look.arm)
        hip = (side * (look.torso_width / 2 - look.limb / 2), 0.0)
        knee = _step(hip, upper_leg, side, look.leg)
        places |= {
            f"{name} shoulder": shoulder,
            f"{name} elbow": elbow,
            f"{name} hand": _step(elbow, lower_arm, side, look.arm * 0.9),
            f"{name} hip": hip,
            f"{name} knee": knee,
            f"{name} foot": _step(knee, lower_leg, side, look.leg * 0.95),
        }
    return places


def head_height(look: Look) -> float:
    """The y of the middle of the head."""
    return -look.torso_height - look.head * 0.95


def _step(start: Point, angle: float, side: int, length: float) -> Point:
    radians = math.radians(angle)
    return start[0] + side * math.sin(radians) * length, start[1] + math.cos(radians) * length


class Figure:
    """Draws one character on the picture and, in the same strokes, on a mask."""

    def __init__(self, character: Character, image: Image.Image, mask: Image.Image):
        self.character = character
        self.look = LOOKS[character.subject]
        if character.color != NONE and self.look.sleeve:
            # Those who have a colour of their own wear the other one on their limbs.
            worn = SHIRTS[character.color]
            self.look = replace(self.look, sleeve=worn, hand=worn, legs=worn, shoe=shade(worn, 0.6))
        self.shirt = self.look.shirt or SHIRTS[character.color]
        self.sleeve = self.look.sleeve or self.shirt
        self.pens = (ImageDraw.Draw(image), ImageDraw.Draw(mask))
        self.unit = character.scale * FIGURE_SCALE
        self.joints = joints(character)
        radians = math.radians(character.pose.rotation)
        self.cos, self.sin = math.cos(radians), math.sin(radians)
        self.lying = 45 < character.pose.rotation < 135
        self.upside_down = character.pose.rotation >= 135
        self._stand_on_ground()

    def _stand_on_ground(self) -> None:
        turned = {name: self._turn(point) for name, point in self.joints.items()}
        heights = [point[1] for point in turned.values()]
        # On its hands the head hangs free; otherwise it may be the lowest part.
        if not self.upside_down:
            heights.append(turned["head"][1] + self.look.head)
        if self.lying:
            heights.append(self.look.torso_width / 2)
        self.lowest = max(heights) + self.look.limb / 2
        across = [point[0] for point in turned.values()]
        middle = (min(across) + max(across)) / 2
        self.middle = middle if self.lying else middle * 0.35

    def _turn(self, point: Point) -> Point:
        return point[0] * self.cos - point[1] * self.sin, point[0] * self.sin + point[1] * self.cos

    def _place(self, point: Point) -> Point:
        x, y = self._turn(point)
        return (
            (self.character.x + (x - self.middle) * self.unit) * SUPERSAMPLING,
            (self.character.ground + (y - self.lowest) * self.unit) * SUPERSAMPLING,
        )

    def capsule(self, start: Point, end: Point, width: float, color: Color) -> None:
        """A thick line with round ends."""
        if self.look.outline and color != BLACK:
            self._stroke(start, end, width + 1.6, self.look.outline)
        self._stroke(start, end, width, color)

    def _stroke(self, start: Point, end: Point, width: float, color: Color) -> None:
        (x0, y0), (x1, y1) = self._place(start), self._place(end)
        r = width * self.unit * SUPERSAMPLING / 2
        for pen, ink in zip(self.pens, (color, 255)):
            pen.line([(x0, y0), (x1, y1)], fill=ink, width=int(2 * r))
            pen.ellipse([x0 - r, y0 - r, x0 + r, y0 + r], fill=ink)
            pen.ellipse([x1 - r, y1 - r, x1 + r, y1 + r], fill=ink)

    def polygon(self, points: list[Point], color: Color) -> None:
        """A filled polygon."""
        corners = [self._place(point) for point in points]
        for pen, ink in zip(self.pens, (color, 255)):
            pen.polygon(corners, fill=ink)

    def dot(self, x: float, y: float, radius: float, color: Color, stretch: float = 1.0) -> None:
        """A disc, stretched across the picture by `stretch`."""
        cx, cy = self._place((x, y))
        r = radius * self.unit * SUPERSAMPLING
        for pen, ink in zip(self.pens, (color, 255)):
            pen.ellipse([cx - r * stretch, cy - r, cx + r * stretch, cy + r], fill=ink)

    def draw(self) -> None:
        """Draw everything, back to front."""
        self._behind()
        for side in ("left", "right"):
            hip, knee, foot = (self.joints[f"{side} {part}"] for part in ("hip", "knee", "foot"))
            self.capsule(hip, knee, self.look.limb, self.look.legs)
            self.capsule(knee, foot, self.look.limb * 0.9, self.look.legs)
            self.capsule(foot, foot, self.look.limb * 1.2, self.look.shoe)
        self._torso()
        if self.character.accessory == STRIPED:
            self._stripes()
        self._ears()
        self._head()
        if self.character.accessory in (HAT, POINTED_HAT):
            self._hat()
        for side in ("left", "right"):
            shoulder, elbow, hand = (self.joints[f"{side} {part}"] for part in ("shoulder", "elbow", "hand"))
            self.capsule(shoulder, elbow, self.look.limb * 0.95, shade(self.sleeve, 0.92))
            self.capsule(elbow, hand, self.look.limb * 0.88, shade(self.sleeve, 0.8))
            self.capsule(hand, hand, self.look.limb * 1.05, self.look.hand)

    def _behind(self) -> None:
        y, r = head_height(self.look), self.look.head
        if self.character.subject == "cat":
            self.capsule((0, 0), (9, -5), 2.4, self.sleeve)
            self.capsule((9, -5), (10, -10), 2.4, self.sleeve)
        if self.character.subject == "woman":
            self.dot(0, y + 3, r * 1.15, self.look.hair)
            self.polygon([(-r, y), (r, y), (r, y + 11), (-r, y + 11)], self.look.hair)

    def _torso(self) -> None:
        subject, height = self.character.subject, self.look.torso_height
        top = self.look.torso_width / 2
        hips = top * 0.85
        if subject == "skeleton":
            self.capsule((0, 0), (0, -height), 2.6, self.shirt)
            for rib in (3, 6, 9):
                self.capsule((-4, -height + rib), (4, -height + rib), 1.5, self.shirt)
        elif self.look.boxy:
            self.polygon([(-top, -height), (top, -height), (top, 1), (-top, 1)], self.shirt)
            self.polygon([(-3, -height + 3), (3, -height + 3), (3, -height + 7), (-3, -height + 7)], (90, 240, 250))
        else:
            self.polygon([(-top, -height + 1), (top, -height + 1), (hips, 1), (-hips, 1)], self.shirt)
            self.capsule((-top + 1.5, -height + 1.5), (top - 1.5, -height + 1.5), 3, self.shirt)
            self.capsule((-hips + 1.5, 0), (hips - 1.5, 0), 3.4, self.shirt)
            if self.look.torso_width >= 13:
                self.dot(0, -height / 2, height * 0.55, self.shirt, 1.1)
        if subject == "woman":
            self.polygon([(-hips, -3), (hips, -3), (hips + 4.5, 6), (-hips - 4.5, 6)], self.shirt)
        elif subject == "wizard":
            self.polygon([(-hips, -3), (hips, -3), (hips + 3, 7), (-hips - 3, 7)], self.shirt)
        elif subject == "penguin":
            self.dot(0, -height / 2 + 0.5, height * 0.44, WHITE, 0.9)

    def _stripes(self) -> None:
        height, half = self.look.torso_height, self.look.torso_width / 2 - 1.5
        # Bright bodies get dark stripes and dark ones bright stripes.
        ink = BLACK if sum(self.shirt) > 330 else WHITE
        for share in (0.25, 0.55, 0.85):
            self.capsule((-half, -height * share), (half, -height * share), 1.7, ink)

    def _hat(self) -> None:
        brim, r = head_height(self.look) - self.look.head * 0.55, self.look.head
        color = HATS[self.character.accessory]
        if self.character.accessory == POINTED_HAT:
            self.polygon([(-r * 1.15, brim), (r * 1.15, brim), (0, brim - r * 1.9)], color)
        else:
            self.polygon([(-r * 0.8, brim - r), (r * 0.8, brim - r), (r * 0.8, brim), (-r * 0.8, brim)], color)
            self.capsule((-r * 1.2, brim), (r * 1.2, brim), 2.2, color)

    def _ears(self) -> None:
        y, r, color = head_height(self.look), self.look.head, self.look.ear_color
        for side in (-1, 1):
            if self.look.ears == "round":
                self.dot(side * r * 0.8, y - r * 0.75, r * 0.42, color)
            elif self.look.ears == "point":
                tip = (side * r * 0.95, y - r * 1.5)
                self.polygon([(side * r * 1.05, y - r * 0.1), (side * r * 0.2, y - r * 0.8), tip], color)
            elif self.look.ears == "long":
                self.capsule((side * r * 0.45, y - r * 0.6), (side * r * 0.6, y - r * 2.0), 3.0, color)
            elif self.look.ears == "eyes":
                self.dot(side * r * 0.7, y - r * 0.8, 2.8, color)
                self.dot(side * r * 0.7, y - r * 0.9, 1.9, WHITE)
                self.dot(side * r * 0.7, y - r * 0.9, 1.0, BLACK)

    def _head(self) -> None:
        y, r, skin = head_height(self.look), self.look.head, self.look.skin
        if self.look.boxy:
            self.polygon([(-r, y - r * 0.9), (r, y - r * 0.9), (r, y + r * 0.8), (-r, y + r * 0.8)], skin)
            self.capsule((0, y - r), (0, y - r * 1.6), 1.2, (90, 90, 100))
            self.dot(0, y - r * 1.7, 1.7, (230, 50, 50))
        else:
            stretch = 1.0 if self.lying else self.look.head_width
            if self.look.outline:
                self.dot(0, y, r + 0.8, self.look.outline, stretch)
            self.dot(0, y, r, skin, stretch)
        if self.look.hair:
            for x in (-3.6, -1.2, 1.2, 3.6):
                self.dot(x, y - r * 0.75, 2.2, self.look.hair)
        self._face(y, r)

    def _face(self, y: float, r: float) -> None:
        subject = self.character.subject
        if subject == "ninja":
            self.capsule((-5.4, y - 3), (5.4, y - 3), 2.0, (226, 40, 40))
            self.capsule((-3.8, y), (3.8, y), 3.6, SKIN)
        if subject == "penguin":
            self.dot(0, y + 1, r * 0.64, WHITE)
            self.polygon([(-2.2, y + 2), (2.2, y + 2), (0, y + 5.4)], (244, 150, 30))
        spread, radius, color = {
            "robot": (2.4, 1.5, (255, 226, 60)),
            "alien": (3.2, 2.4, BLACK),
            "skeleton": (2.3, 1.8, BLACK),
            "panda": (3.0, 2.2, BLACK),
        }.get(subject, (2.2, 1.2, BLACK))
        if self.look.ears != "eyes":
            for side in (-1, 1):
                self.dot(side * spread, y + 0.3, radius, color)
        if subject == "skeleton":
            self.capsule((-2, y + 3.4), (2, y + 3.4), 1.0, BLACK)
        elif subject == "panda":
            self.dot(0, y + 3, 1.4, BLACK)
        elif subject == "bear":
            self.dot(0, y + 3, 3.0, (206, 166, 116))
            self.dot(0, y + 2.2, 1.2, BLACK)
        elif subject == "pig":
            self.dot(0, y + 2.8, 2.9, (224, 84, 120))
            for side in (-1, 1):
                self.dot(side, y + 2.8, 0.7, (120, 30, 60))
        elif subject == "frog":
            self.capsule((-3.5, y + 2.5), (3.5, y + 2.5), 1.2, (220, 80, 70))
        elif subject == "wizard":
            self.polygon([(-r * 1.2, y - r * 0.4), (r * 1.2, y - r * 0.4), (0, y - r * 2.2)], (96, 36, 150))
            self.polygon([(-r * 0.75, y + 1.6), (r * 0.75, y + 1.6), (0, y + 9)], WHITE)
