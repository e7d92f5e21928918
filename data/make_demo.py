"""Generate the demo competition: small pictures with multiple-choice questions in Korean.

    python data/make_demo.py                 # writes the tables and images of this folder again
    python data/make_demo.py --out /folder   # writes them elsewhere

A picture shows coloured shapes or one handwritten digit. The script prints how many rows it has
written, which takes about ten seconds on one CPU core. The same seed gives the same bytes with
the same versions of numpy, Pillow and scikit-learn.

The wording and the choices of a row say nothing about its answer: every truth is drawn uniformly
among its four choices, so a model has to look at the picture. `pretrain_tiny.py` draws other
wordings, shades and digits from the same generator through `PRETRAIN`. The demo adds words which
that distribution never contains.
"""

import argparse
import colorsys
import csv
import functools
import hashlib
import io
import math
import random
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_digits

DATA = Path(__file__).resolve().parent
TRAIN_ROWS = 560
TEST_ROWS = 560
CELL = 32  # side of a cell of the picture, in pixels
LETTERS = "abcd"
TYPES = ("counting", "color", "ocr", "yesno", "location", "attribute", "general")

# === Words ========================================================================================
# The first of each pair is known from pretraining, the second appears in the demo alone.
SHAPES = {
    "circle": ("원", "동그라미"),
    "square": ("사각형", "네모"),
    "triangle": ("삼각형", "세모"),
    "star": ("별", "별표"),
    "cross": ("십자", "더하기"),
    "diamond": ("마름모", "다이아몬드"),
}
COLORS = {
    "red": ("빨간색", "레드"),
    "orange": ("주황색", "오렌지"),
    "yellow": ("노란색", "옐로"),
    "green": ("초록색", "그린"),
    "blue": ("파란색", "블루"),
    "purple": ("보라색", "퍼플"),
    "pink": ("분홍색", "핑크"),
}
ADJECTIVES = {
    "red": "빨간",
    "orange": "주황",
    "yellow": "노란",
    "green": "초록",
    "blue": "파란",
    "purple": "보라",
    "pink": "분홍",
}
FILLS = {
    "solid": ("색칠됨", "단색"),
    "outline": ("테두리만", "외곽선"),
    "striped": ("줄무늬", "스트라이프"),
    "dotted": ("점무늬", "도트"),
}
ZONES = {  # corner of the picture: (0 left or 1 right, 0 top or 1 bottom)
    (0, 0): ("좌상단", "북서쪽"),
    (1, 0): ("우상단", "북동쪽"),
    (0, 1): ("좌하단", "남서쪽"),
    (1, 1): ("우하단", "남동쪽"),
}
COUNTS = {
    1: ("1개", "하나"),
    2: ("2개", "둘"),
    3: ("3개", "셋"),
    4: ("4개", "넷"),
    5: ("5개", "다섯"),
}
DIGITS = {
    0: ("0", "영"),
    1: ("1", "일"),
    2: ("2", "이"),
    3: ("3", "삼"),
    4: ("4", "사"),
    5: ("5", "오"),
    6: ("6", "육"),
    7: ("7", "칠"),
    8: ("8", "팔"),
    9: ("9", "구"),
}
VERDICTS = (  # yes, no, and two that are never right
    ("있음", "없음", "모름", "비었음"),
    ("네", "아니요", "글쎄요", "무응답"),
)

PRETRAIN_WORDINGS = {
    "counting": [
        "이미지에 {x:이가} 몇 개 있습니까?",
        "{x:은는} 모두 몇 개입니까?",
        "그림 속 {x}의 개수는?",
    ],
    "color": ["{x}의 색은 무엇입니까?", "{x:은는} 무슨 색입니까?", "그림에서 {x}의 색깔은?"],
    "ocr": [
        "이미지에 적힌 숫자는 무엇입니까?",
        "어떤 숫자가 쓰여 있습니까?",
        "그림 속 숫자를 읽으세요.",
    ],
    "yesno": ["{x:이가} 있습니까?", "그림에 {x:이가} 있나요?"],
    "location": ["{x:은는} 어디에 있습니까?", "그림에서 {x}의 위치는?"],
    "attribute": ["도형의 모양은?", "그림 속의 것은 어떤 모양일까요?"],
    "attribute_fill": ["{x}의 무늬는 어떤 종류일까요?", "그림에서 {x}의 칠해진 상태는?"],
    "general": ["이미지에 대한 올바른 설명은?", "다음 중 그림과 일치하는 설명은?"],
}
DEMO_WORDINGS = {
    "counting": ["사진에서 {x:은는} 몇 개 보이나요?", "이 사진에 나온 {x}의 개수를 고르세요."],
    "color": ["사진 속 {x:은는} 어떤 색으로 칠해져 있나요?", "{x}의 색상을 고르세요."],
    "ocr": ["손으로 쓴 숫자를 고르세요.", "사진에 적혀 있는 숫자는?"],
    "yesno": ["사진에서 {x:을를} 볼 수 있나요?", "이 사진에 {x:이가} 보입니까?"],
    "location": ["사진에서 {x:이가} 놓인 위치를 고르세요.", "{x:은는} 사진의 어느 쪽에 있나요?"],
    "attribute": ["사진에 나온 도형의 형태를 고르세요.", "이 물체의 모양은?"],
    "attribute_fill": ["사진 속 {x}의 무늬 상태를 고르세요.", "{x:은는} 어떤 무늬일까요?"],
    "general": ["사진을 바르게 나타낸 문장을 고르세요.", "다음 중 사진에 대한 옳은 설명은?"],
}


class Noun(str):
    """A Korean noun whose format spec appends the particle that fits its last syllable.

    >>> f"{Noun('원'):은는}", f"{Noun('세모'):은는}"
    ('원은', '세모는')
    """

    def __format__(self, particles: str) -> str:
        if not particles:
            return str(self)
        # Unicode counts the 28 endings of a syllable from 0xAC00; the first is no consonant.
        has_final_consonant = (ord(self[-1]) - 0xAC00) % 28 != 0
        return str(self) + particles[0 if has_final_consonant else 1]


# === Domains: what differs between pretraining and the demo =======================================
@dataclass(frozen=True)
class Domain:
    """One distribution of pictures and language."""

    wordings: dict[str, list[str]]  # of the questions, by type
    new_words: dict[str, float]  # share of rows that use the demo's own words, by type
    hues: dict[str, float]  # of each colour, in degrees
    hue_jitter: float  # degrees to both sides
    saturation: tuple[float, float]  # least and most, of 1
    value: tuple[float, float]  # least and most, of 1
    noise: tuple[float, float]  # least and most standard deviation, in grey levels
    digit_rows: tuple[int, ...]  # rows of load_digits
    font_digits: float  # share of digits drawn with a font
    quality: tuple[int, int]  # least and most, of the JPEG file


@functools.cache
def digit_split() -> dict[str, tuple[int, ...]]:
    """Disjoint rows of load_digits for train, test and pretraining, from a fixed shuffle."""
    rows = list(range(len(load_digits().target)))
    random.Random(7).shuffle(rows)
    return {
        "train": tuple(rows[:300]),
        "test": tuple(rows[300:500]),
        "pretrain": tuple(rows[500:]),
    }


PRETRAIN = Domain(
    wordings=PRETRAIN_WORDINGS,
    new_words=dict.fromkeys(TYPES, 0.0),
    hues={
        "red": 0,
        "orange": 27,
        "yellow": 54,
        "green": 122,
        "blue": 222,
        "purple": 275,
        "pink": 325,
    },
    hue_jitter=9,
    saturation=(0.5, 1.0),
    value=(0.6, 1.0),
    noise=(0, 12),
    digit_rows=digit_split()["pretrain"],
    font_digits=0.35,
    quality=(60, 95),
)
DEMO_NEW_WORDS = {
    "counting": 0.4,
    "color": 0.15,
    "ocr": 0.2,
    "yesno": 0.0,
    "location": 0.0,
    "attribute": 0.6,
    "general": 0.6,
}


def demo_domain(split: str, new_words: dict[str, float] | None = None) -> Domain:
    """The demo's distribution with the digits of one split."""
    return Domain(
        wordings=DEMO_WORDINGS,
        new_words=new_words or DEMO_NEW_WORDS,
        hues={
            "red": 354,
            "orange": 23,
            "yellow": 49,
            "green": 138,
            "blue": 212,
            "purple": 268,
            "pink": 331,
        },
        hue_jitter=5,
        saturation=(0.5, 0.85),
        value=(0.6, 0.9),
        noise=(4, 12),
        digit_rows=digit_split()[split],
        font_digits=0.0,
        quality=(75, 92),
    )


def weaker_shift(domain: Domain, shift: float) -> Domain:
    """A distribution between pretraining (shift 0) and `domain` (1), for another competition.

    Its questions have the wordings of both.
    """
    wordings = {}
    hues = {}
    for kind, texts in domain.wordings.items():
        wordings[kind] = [*PRETRAIN.wordings[kind], *texts]
    for color, hue in domain.hues.items():
        turn = (hue - PRETRAIN.hues[color] + 180) % 360 - 180
        hues[color] = (PRETRAIN.hues[color] + shift * turn) % 360
    return replace(
        domain,
        wordings=wordings,
        new_words={kind: shift * share for kind, share in domain.new_words.items()},
        hues=hues,
        font_digits=(1 - shift) * PRETRAIN.font_digits,
    )


# === Scenes =======================================================================================
@dataclass
class Item:
    """One drawn shape."""

    shape: str  # a key of SHAPES
    color: str  # a key of COLORS
    fill: str = "solid"  # a key of FILLS
    radius: float = 10.0  # pixels
    place: tuple[int, int] | None = None  # a key of ZONES, or None for a random free cell


@dataclass
class Scene:
    """Everything that `render` needs: a picture is a pure function of its scene and its domain."""

    size: tuple[int, int]  # width and height, in pixels
    items: list[Item] = field(default_factory=list)
    digit: int | None = None
    seed: int = 0


def place_items(scene: Scene) -> list[tuple[int, int]]:
    """The (column, row) cell of each item, then that of the digit if there is one.

    An item with a fixed corner keeps the others out of it. A cell is one merged patch: one thing
    in one image token keeps a tiny model able to learn.
    """
    rng = random.Random(scene.seed)
    columns = scene.size[0] // CELL
    rows = scene.size[1] // CELL
    corners = []
    for item in scene.items:
        corner = None
        if item.place is not None:
            right, bottom = item.place
            corner = (right * (columns - 1), bottom * (rows - 1))
        corners.append(corner)
    cells = [(column, row) for column in range(columns) for row in range(rows)]
    free = [cell for cell in cells if cell not in corners]
    rng.shuffle(free)
    taken = [corner or free.pop() for corner in corners]
    if scene.digit is not None:
        taken.append(free.pop())
    return taken


# === Shapes and digits ============================================================================
def polygon(shape: str, radius: float) -> list[tuple[float, float]]:
    """Corner points of a shape around the origin."""
    if shape == "square":
        side = 0.82 * radius
        return [(-side, -side), (side, -side), (side, side), (-side, side)]
    if shape == "diamond":
        return [(0, -1.1 * radius), (0.75 * radius, 0), (0, 1.1 * radius), (-0.75 * radius, 0)]
    if shape == "cross":
        return cross_corners(radius)
    corners = {"circle": 28, "triangle": 3, "star": 10}[shape]
    points = []
    for corner in range(corners):
        is_inner = shape == "star" and corner % 2 == 1
        length = radius * (0.42 if is_inner else 1.0)
        angle = 2 * math.pi * corner / corners - math.pi / 2
        points.append((length * math.cos(angle), length * math.sin(angle)))
    return points


def cross_corners(radius: float) -> list[tuple[float, float]]:
    """The twelve corner points of a cross: a quarter of them, turned four times."""
    arm = 0.33 * radius
    quarter = [(arm, -radius), (arm, -arm), (radius, -arm)]
    turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]  # cosine and sine of 0, 90, 180 and 270 degrees
    points = []
    for cosine, sine in turns:
        for x, y in quarter:
            points.append((x * cosine - y * sine, x * sine + y * cosine))
    return points


def item_mask(item: Item, angle: float, scale: int = 3) -> Image.Image:
    """Alpha mask of one item turned by `angle` radians; drawn `scale` times as large, then shrunk.

    Shrinking makes the edges smooth.
    """
    half = math.ceil(1.15 * item.radius) + 1
    side = 2 * half * scale
    cosine = math.cos(angle)
    sine = math.sin(angle)
    points = []
    for x, y in polygon(item.shape, item.radius):
        turned_x = scale * (half + x * cosine - y * sine)
        turned_y = scale * (half + x * sine + y * cosine)
        points.append((turned_x, turned_y))
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    draw.polygon(points, fill=0 if item.fill == "outline" else 255)
    pitch = max(4 * scale, round(0.45 * item.radius * scale))
    if item.fill == "striped":
        for y in range(0, side, pitch):
            draw.rectangle((0, y, side, y + pitch // 2), fill=0)
    if item.fill == "dotted":
        dot = pitch // 3
        for x in range(0, side, pitch):
            for y in range(0, side, pitch):
                draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=0)
    if item.fill != "solid":
        width = max(2 * scale, round(0.17 * item.radius * scale))
        draw.line([*points, *points[:2]], fill=255, width=width, joint="curve")
    return mask.reduce(scale)


@functools.cache
def digit_fonts() -> tuple[str, ...]:
    """Font files that come with matplotlib, so that no system font is needed."""
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts/ttf")
    paths = [str(path) for path in folder.glob("DejaVu*.ttf") if "Display" not in path.name]
    return tuple(sorted(paths))


@functools.cache
def digit_font(path: str) -> ImageFont.FreeTypeFont:
    """The font of that file, at the size in which digits are drawn."""
    return ImageFont.truetype(path, 40)


@functools.cache
def handwritten(rows: tuple[int, ...]) -> dict[int, np.ndarray]:
    """The 8x8 digits of some rows of load_digits, by value; from 0 to 1."""
    digits = load_digits()
    chosen = np.array(rows)
    values = digits.target[chosen]
    return {value: digits.images[chosen[values == value]] / 16 for value in range(10)}


def digit_mask(rng: random.Random, domain: Domain, value: int) -> Image.Image:
    """Alpha mask of a digit that fills a cell, handwritten or drawn with a font."""
    height = rng.randint(26, 31)
    if rng.random() < domain.font_digits:
        picture = Image.new("L", (48, 48))
        font = digit_font(rng.choice(digit_fonts()))
        ImageDraw.Draw(picture).text((24, 24), str(value), fill=255, font=font, anchor="mm")
        if rng.random() < 0.6:  # as coarse as the handwritten ones
            picture = picture.resize((10, 10), Image.Resampling.BOX)
    else:
        pixels = 255 * rng.choice(handwritten(domain.digit_rows)[value])
        picture = Image.fromarray(pixels.astype(np.uint8))
    width = round(height * rng.uniform(0.85, 1.0))
    mask = picture.resize((width, height), Image.Resampling.BICUBIC)
    return mask.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR)


# === Pictures =====================================================================================
def item_color(rng: random.Random, domain: Domain, name: str) -> tuple[int, ...]:
    """A random shade of a colour: red, green and blue from 0 to 255."""
    hue = (domain.hues[name] + rng.uniform(-1, 1) * domain.hue_jitter) % 360 / 360
    saturation = rng.uniform(*domain.saturation)
    value = rng.uniform(*domain.value)
    channels = colorsys.hsv_to_rgb(hue, saturation, value)
    return tuple(round(255 * channel) for channel in channels)


def background(rng: random.Random, size: tuple[int, int]) -> np.ndarray:
    """A greyish gradient with a faint texture, as float pixels (height, width, 3)."""
    width, height = size
    base = rng.choice([rng.uniform(25, 80), rng.uniform(175, 240)])
    ends = []
    for _ in range(2):
        ends.append(np.array([base + rng.uniform(-16, 16) for _ in range(3)]))
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:height, 0:width]
    ramp = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle) + 0.5
    picture = ends[0] + (ends[1] - ends[0]) * ramp[..., None]
    if rng.random() < 0.5:
        period = rng.uniform(6, 24)
        wave = np.sin(2 * math.pi * (x * math.sin(angle) + y * math.cos(angle)) / period)
        picture = picture + rng.uniform(0, 7) * wave[..., None]
    return picture


def ink(rng: random.Random, canvas: Image.Image) -> tuple[int, ...]:
    """Dark ink on light paper, light ink on dark paper."""
    is_dark_paper = np.asarray(canvas).mean() < 128
    darkest, lightest = (190, 250) if is_dark_paper else (10, 80)
    return tuple(rng.randint(darkest, lightest) for _ in range(3))


def paste_in_cell(
    rng: random.Random,
    canvas: Image.Image,
    cell: tuple[int, int],
    mask: Image.Image,
    color: tuple[int, ...],
) -> None:
    """Paint a mask in a colour somewhere within its cell (column, row)."""
    corner = []
    for number, extent in zip(cell, mask.size, strict=True):
        slack = max(0, CELL - extent) / 2
        corner.append(round(number * CELL + CELL / 2 - extent / 2 + rng.uniform(-slack, slack)))
    left, top = corner
    canvas.paste(color, (left, top, left + mask.width, top + mask.height), mask)


def render(scene: Scene, domain: Domain) -> Image.Image:
    """Draw a scene: background, items or a digit, slight blur and noise."""
    rng = random.Random(scene.seed + 1)
    canvas = Image.fromarray(background(rng, scene.size).clip(0, 255).astype(np.uint8))
    cells = place_items(scene)
    for item, cell in zip(scene.items, cells, strict=False):  # the digit's cell comes last
        mask = item_mask(item, math.radians(rng.uniform(-10, 10)))
        color = item_color(rng, domain, item.color)
        paste_in_cell(rng, canvas, cell, mask, color)
    if scene.digit is not None:
        mask = digit_mask(rng, domain, scene.digit)
        color = ink(rng, canvas)
        paste_in_cell(rng, canvas, cells[-1], mask, color)
    if rng.random() < 0.3:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    width, height = scene.size
    generator = np.random.default_rng(scene.seed)
    noise = generator.standard_normal((height, width, 3), dtype=np.float32)
    pixels = np.asarray(canvas, dtype=np.float32) + rng.uniform(*domain.noise) * noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg_bytes(picture: Image.Image, quality: int) -> bytes:
    """The picture as a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


# === Questions ====================================================================================
@dataclass
class Task:
    """A scene with one question about it; the true choice comes first until `make_row` moves it."""

    kind: str  # one of TYPES
    wordings: list[str]  # of the question
    choices: list[str]  # four
    scene: Scene
    slots: dict[str, Noun] = field(default_factory=dict)  # what the wordings' {x} stands for

    def questions(self) -> list[str]:
        """The question in each of its wordings."""
        return [wording.format(**self.slots) for wording in self.wordings]


def new_scene(
    rng: random.Random, items: list[Item] | None = None, digit: int | None = None
) -> Scene:
    """A scene of random size with these items or this digit."""
    sizes = [(96, 96), (128, 96), (96, 128)]
    size = rng.choices(sizes, weights=[6, 2, 2])[0]
    return Scene(size, items or [], digit, rng.getrandbits(32))


def pick(rng: random.Random, values: Iterable, count: int) -> list:
    """Distinct values in random order."""
    return rng.sample(list(values), count)


def bystanders(
    rng: random.Random, count: int, shapes: Iterable[str], colors: Iterable[str]
) -> list[Item]:
    """Other items of the picture, with shapes and colours that cannot change the answer."""
    shapes = list(shapes)
    colors = list(colors)
    items = []
    for _ in range(count):
        shape = rng.choice(shapes)
        color = rng.choice(colors)
        items.append(Item(shape, color, radius=rng.uniform(10, 13)))
    return items


def shape_slot(shape: str) -> dict[str, Noun]:
    """What a question puts for {x} when it asks about that shape; always the word known before."""
    return {"x": Noun(SHAPES[shape][0])}


# Every ask_... draws the scene and the question of one type; `new` is 1 for the demo's own words.
def ask_counting(rng: random.Random, domain: Domain, new: int) -> Task:
    """How many of a shape are there? Up to three items of other shapes stand beside them."""
    window = rng.choice([range(1, 5), range(2, 6)])
    counts = pick(rng, window, 4)
    shape, *other_shapes = pick(rng, SHAPES, 4)
    items = bystanders(rng, counts[0], [shape], COLORS)
    items += bystanders(rng, rng.randint(0, 3), other_shapes, COLORS)
    return Task(
        kind="counting",
        wordings=domain.wordings["counting"],
        choices=[COUNTS[count][new] for count in counts],
        scene=new_scene(rng, items),
        slots=shape_slot(shape),
    )


def ask_color(rng: random.Random, domain: Domain, new: int) -> Task:
    """Which colour has a shape? The other choices are colours that other items may have."""
    colors = pick(rng, COLORS, 4)
    shape, *other_shapes = pick(rng, SHAPES, 4)
    target = Item(shape, colors[0], radius=rng.uniform(11, 14))
    others = bystanders(rng, rng.randint(1, 2), other_shapes, colors[1:])
    return Task(
        kind="color",
        wordings=domain.wordings["color"],
        choices=[COLORS[color][new] for color in colors],
        scene=new_scene(rng, [target, *others]),
        slots=shape_slot(shape),
    )


def ask_ocr(rng: random.Random, domain: Domain, new: int) -> Task:
    """Which digit is written there?"""
    digits = pick(rng, DIGITS, 4)
    return Task(
        kind="ocr",
        wordings=domain.wordings["ocr"],
        choices=[DIGITS[digit][new] for digit in digits],
        scene=new_scene(rng, digit=digits[0]),
    )


def ask_yesno(rng: random.Random, domain: Domain, new: int) -> Task:
    """Is a shape there? In half of the pictures it is."""
    shape, *other_shapes = pick(rng, SHAPES, 4)
    is_there = rng.random() < 0.5
    items = []
    if is_there:
        color = rng.choice(list(COLORS))
        items.append(Item(shape, color, radius=rng.uniform(11, 14)))
    others = rng.randint(1, 2)
    # One more stands in for a missing target: the number of items must not hint at the answer.
    if not is_there:
        others += 1
    items += bystanders(rng, others, other_shapes, COLORS)
    yes, no, *never = VERDICTS[new]
    return Task(
        kind="yesno",
        wordings=domain.wordings["yesno"],
        choices=[yes, no, *never] if is_there else [no, yes, *never],
        scene=new_scene(rng, items),
        slots=shape_slot(shape),
    )


def ask_location(rng: random.Random, domain: Domain, new: int) -> Task:
    """In which corner is a shape? Up to two other shapes stand in other corners."""
    zones = pick(rng, ZONES, 4)
    shapes = pick(rng, SHAPES, 4)
    shown = rng.randint(1, 3)
    items = []
    for shape, zone in list(zip(shapes, zones, strict=True))[:shown]:
        color = rng.choice(list(COLORS))
        items.append(Item(shape, color, radius=rng.uniform(11, 14), place=zone))
    return Task(
        kind="location",
        wordings=domain.wordings["location"],
        choices=[ZONES[zone][new] for zone in zones],
        scene=new_scene(rng, items),
        slots=shape_slot(shapes[0]),
    )


def ask_attribute(rng: random.Random, domain: Domain, new: int) -> Task:
    """Which shape is it, or how is a shape filled? Half of the questions each."""
    shapes = pick(rng, SHAPES, 4)
    fills = pick(rng, FILLS, 4)
    if rng.random() < 0.5:
        return Task(
            kind="attribute",
            wordings=domain.wordings["attribute"],
            choices=[SHAPES[shape][new] for shape in shapes],
            scene=new_scene(rng, bystanders(rng, 1, shapes[:1], COLORS)),
        )
    shown = rng.randint(1, 2)
    items = []
    for shape, fill in list(zip(shapes, fills, strict=True))[:shown]:
        color = rng.choice(list(COLORS))
        items.append(Item(shape, color, fill, rng.uniform(12.5, 14.5)))
    return Task(
        kind="attribute",
        wordings=domain.wordings["attribute_fill"],
        choices=[FILLS[fill][new] for fill in fills],
        scene=new_scene(rng, items),
        slots=shape_slot(shapes[0]),
    )


def ask_general(rng: random.Random, domain: Domain, new: int) -> Task:
    """Which description is true? Each choice names another colour and another shape."""
    shapes = pick(rng, SHAPES, 6)
    colors = pick(rng, COLORS, 7)
    items = [Item(shapes[0], colors[0], radius=rng.uniform(11, 14))]
    items += bystanders(rng, rng.randint(0, 2), shapes[4:], colors[4:])
    choices = []
    for color, shape in zip(colors[:4], shapes[:4], strict=True):
        name = Noun(f"{ADJECTIVES[color]} {SHAPES[shape][new]}")
        choices.append(f"{name:이가} 있습니다")
    return Task(
        kind="general",
        wordings=domain.wordings["general"],
        choices=choices,
        scene=new_scene(rng, items),
    )


ASK = {
    "counting": ask_counting,
    "color": ask_color,
    "ocr": ask_ocr,
    "yesno": ask_yesno,
    "location": ask_location,
    "attribute": ask_attribute,
    "general": ask_general,
}


def make_task(rng: random.Random, domain: Domain, kind: str) -> Task:
    """Draw a question of one type with its scene."""
    new = int(rng.random() < domain.new_words[kind])
    return ASK[kind](rng, domain, new)


def make_row(rng: random.Random, task: Task, letter: str, question: str | None = None) -> dict:
    """A table row with the truth at `letter` and the other choices in random order."""
    choices = rng.sample(task.choices[1:], 3)
    choices.insert(LETTERS.index(letter), task.choices[0])
    question = question or rng.choice(task.questions())
    return {
        "question": question,
        **dict(zip(LETTERS, choices, strict=True)),
        "answer": letter,
        "type": task.kind,
    }


# === The competition's files ======================================================================
def draw_split(
    split: str,
    count: int,
    seed: int,
    new_words: dict[str, float] | None = None,
    shift: float = 1.0,
) -> list[dict]:
    """Rows of one split with their task and JPEG bytes.

    Types and answers are balanced; their order is random. `shift`: see `weaker_shift`.
    """
    rng = random.Random(seed)
    domain = demo_domain(split, new_words)
    if shift < 1:
        domain = weaker_shift(domain, shift)
    plan = []
    for number in range(count):
        kind = TYPES[number % len(TYPES)]
        letter = LETTERS[number // len(TYPES) % len(LETTERS)]
        plan.append((kind, letter))
    rng.shuffle(plan)
    rows = []
    for number, (kind, letter) in enumerate(plan, start=1):
        task = make_task(rng, domain, kind)
        name = f"{split}_{number:04d}"
        row = {
            "id": name,
            "path": f"{split}/{name}.jpg",
            "jpeg": jpeg_bytes(render(task.scene, domain), rng.randint(*domain.quality)),
            "task": task,
        }
        row.update(make_row(rng, task, letter))
        rows.append(row)
    return rows


def plant_copy(rng: random.Random, source: dict, target: dict) -> None:
    """Give `target` the picture of `source`, asked about in other words."""
    task = source["task"]
    other_wordings = [text for text in task.questions() if text != source["question"]]
    target["jpeg"] = source["jpeg"]
    target["task"] = task
    target.update(make_row(rng, task, target["answer"], rng.choice(other_wordings)))


def plant_copies(train: list[dict], test: list[dict], seed: int) -> None:
    """Three pictures occur twice in train and two in both splits, for the leakage check to find."""
    rng = random.Random(seed)
    sources = rng.sample(range(len(train)), 5)
    for position, source in enumerate(sources):
        kind = train[source]["type"]  # the copied row keeps its type, so the types stay balanced
        if position < 3:
            pool = [row for number, row in enumerate(train) if number not in sources]
        else:
            pool = test
        candidates = [row for row in pool if row["type"] == kind]
        plant_copy(rng, train[source], rng.choice(candidates))


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    """Write those columns of the rows, with Windows line ends as the competition has them."""
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore", lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)


def write_images(folder: Path, split: str, rows: Sequence[dict]) -> None:
    """Write a split's pictures into an emptied folder of its own."""
    images = folder / "images"
    shutil.rmtree(images / split, ignore_errors=True)
    (images / split).mkdir(parents=True)
    for row in rows:
        (images / row["path"]).write_bytes(row["jpeg"])


def write_competition(folder: Path, train: list[dict], test: list[dict]) -> None:
    """Write pictures and tables in the layout of the competition."""
    write_images(folder, "train", train)
    write_images(folder, "test", test)
    columns = ["id", "path", "question", *LETTERS]
    write_csv(folder / "train.csv", [*columns, "answer"], train)
    write_csv(folder / "test.csv", columns, test)
    write_csv(folder / "test_answers.csv", ["id", "answer", "type"], test)
    blank = [{"id": row["id"], "answer": ""} for row in test]
    write_csv(folder / "sample_submission.csv", ["id", "answer"], blank)


def check(train: list[dict], test: list[dict]) -> None:
    """Fail unless pictures repeat only where planted and each question has its type recognised."""
    sys.path.insert(0, str(DATA.parent))
    from vqa_helpers import question_type

    rows = train + test
    hashes = set()
    wrong = set()
    for row in rows:
        pixels = np.asarray(Image.open(io.BytesIO(row["jpeg"])))
        hashes.add(hashlib.sha256(pixels.tobytes()).digest())
        if question_type(row["question"], [row[letter] for letter in LETTERS]) != row["type"]:
            wrong.add((row["type"], row["question"]))
    assert len(hashes) == len(rows) - 5, "unplanned copies of pictures"
    assert not wrong, f"question_type disagrees: {sorted(wrong)[:5]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=2040)
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write into")
    parser.add_argument(
        "--shift", type=float, default=1.0, help="how far from pretraining, 0 to 1 (the demo)"
    )
    arguments = parser.parse_args()
    shift = arguments.shift
    train = draw_split("train", TRAIN_ROWS, arguments.seed, shift=shift)
    test = draw_split("test", TEST_ROWS, arguments.seed + 1, shift=shift)
    plant_copies(train, test, arguments.seed + 2)
    check(train, test)
    write_competition(arguments.out, train, test)
    print(f"{len(train)} train and {len(test)} test rows in {arguments.out}")


if __name__ == "__main__":
    main()
