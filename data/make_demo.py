"""Generate the demo competition: small pictures of shapes and handwritten digits with multiple-choice questions.

Run `python data/make_demo.py`. The wording and the choices of a row say nothing about its answer: every truth is drawn
uniformly among its four choices, so a model has to look at the picture. `pretrain_tiny.py` draws other wordings, shades
and digits from the same generator through `PRETRAIN`; the demo adds words which that distribution never contains.
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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_digits

DATA = Path(__file__).resolve().parent
TRAIN_ROWS, TEST_ROWS = 560, 560
CELL = 32  # pixels
LETTERS = "abcd"
TYPES = ("counting", "color", "ocr", "yesno", "location", "attribute", "general")

# ---------------------------------------------------------------------------------------------------------------------
# Words: the first of each pair is known from pretraining, the second appears in the demo alone.
# ---------------------------------------------------------------------------------------------------------------------
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
ADJECTIVES = dict(
    zip(COLORS, ("빨간", "주황", "노란", "초록", "파란", "보라", "분홍"), strict=True)
)
FILLS = {
    "solid": ("색칠됨", "단색"),
    "outline": ("테두리만", "외곽선"),
    "striped": ("줄무늬", "스트라이프"),
    "dotted": ("점무늬", "도트"),
}
ZONES = {
    (0, 0): ("좌상단", "북서쪽"),
    (1, 0): ("우상단", "북동쪽"),
    (0, 1): ("좌하단", "남서쪽"),
    (1, 1): ("우하단", "남동쪽"),
}
COUNTS = {n: (f"{n}개", word) for n, word in enumerate(("하나", "둘", "셋", "넷", "다섯"), start=1)}
DIGITS = {n: (str(n), word) for n, word in enumerate("영일이삼사오육칠팔구")}
VERDICTS = (
    ("있음", "없음", "모름", "비었음"),
    ("네", "아니요", "글쎄요", "무응답"),
)  # the last two are never right

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
    """A Korean noun whose format spec appends the particle that fits its last syllable: f"{Noun('원'):은는}"."""

    def __format__(self, particles: str) -> str:
        if not particles:
            return str(self)
        has_final_consonant = (ord(self[-1]) - 0xAC00) % 28 != 0
        return str(self) + particles[0 if has_final_consonant else 1]


# ---------------------------------------------------------------------------------------------------------------------
# Domains: what differs between pretraining and the demo
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Domain:
    """One distribution of pictures and language; `new_words` is the share of rows that use the demo's own words."""

    wordings: dict
    new_words: dict
    hues: dict  # degrees
    hue_jitter: float
    saturation: tuple
    value: tuple
    noise: tuple  # standard deviation in grey levels
    digit_rows: tuple  # rows of load_digits
    font_digits: float  # share of digits drawn with a font
    quality: tuple  # JPEG


@functools.cache
def digit_split() -> dict[str, tuple]:
    """Disjoint rows of load_digits for train, test and pretraining, from a fixed shuffle."""
    rows = list(range(len(load_digits().target)))
    random.Random(7).shuffle(rows)
    return {"train": tuple(rows[:300]), "test": tuple(rows[300:500]), "pretrain": tuple(rows[500:])}


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


def demo_domain(split: str, new_words: dict | None = None) -> Domain:
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


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Item:
    """One drawn shape; `place` is a corner, or None for a random free cell."""

    shape: str
    color: str
    fill: str = "solid"
    radius: float = 10.0
    place: tuple | None = None


@dataclass
class Scene:
    """Everything that `render` needs: a picture is a pure function of its scene and its domain."""

    size: tuple
    items: list = field(default_factory=list)
    digit: int | None = None
    seed: int = 0


def polygon(shape: str, radius: float) -> list[tuple]:
    """Corner points of a shape around the origin."""
    if shape == "square":
        side = 0.82 * radius
        return [(-side, -side), (side, -side), (side, side), (-side, side)]
    if shape == "diamond":
        return [(0, -1.1 * radius), (0.75 * radius, 0), (0, 1.1 * radius), (-0.75 * radius, 0)]
    if shape == "cross":
        arm, full = 0.33 * radius, radius
        quarter = [(arm, -full), (arm, -arm), (full, -arm)]
        turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]  # cosine and sine of 0, 90, 180 and 270 degrees
        return [(x * c - y * s, x * s + y * c) for c, s in turns for x, y in quarter]
    corners, inner = {"circle": (28, 1.0), "triangle": (3, 1.0), "star": (10, 0.42)}[shape]
    lengths = [
        radius * (inner if corner % 2 and shape == "star" else 1.0) for corner in range(corners)
    ]
    angles = [2 * math.pi * corner / corners - math.pi / 2 for corner in range(corners)]
    return [
        (length * math.cos(angle), length * math.sin(angle))
        for length, angle in zip(lengths, angles, strict=True)
    ]


def item_mask(item: Item, angle: float, scale: int = 3) -> Image.Image:
    """Anti-aliased alpha mask of one item."""
    half = math.ceil(1.15 * item.radius) + 1
    side = 2 * half * scale
    cosine, sine = math.cos(angle), math.sin(angle)
    points = [
        (scale * (half + x * cosine - y * sine), scale * (half + x * sine + y * cosine))
        for x, y in polygon(item.shape, item.radius)
    ]
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    width = max(2 * scale, round(0.17 * item.radius * scale))
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
        draw.line([*points, *points[:2]], fill=255, width=width, joint="curve")
    return mask.reduce(scale)


def item_color(rng: random.Random, domain: Domain, name: str) -> tuple:
    """A random shade of a colour."""
    hue = (domain.hues[name] + rng.uniform(-1, 1) * domain.hue_jitter) % 360 / 360
    rgb = colorsys.hsv_to_rgb(hue, rng.uniform(*domain.saturation), rng.uniform(*domain.value))
    return tuple(round(255 * channel) for channel in rgb)


def background(rng: random.Random, size: tuple) -> np.ndarray:
    """A greyish gradient with a faint texture, as float pixels."""
    width, height = size
    base = rng.choice([rng.uniform(25, 80), rng.uniform(175, 240)])
    ends = [np.array([base + rng.uniform(-16, 16) for _ in range(3)]) for _ in range(2)]
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:height, 0:width]
    ramp = (x / width - 0.5) * math.cos(angle) + (y / height - 0.5) * math.sin(angle) + 0.5
    picture = ends[0] + (ends[1] - ends[0]) * ramp[..., None]
    if rng.random() < 0.5:
        period = rng.uniform(6, 24)
        wave = np.sin(2 * math.pi * (x * math.sin(angle) + y * math.cos(angle)) / period)
        picture = picture + rng.uniform(0, 7) * wave[..., None]
    return picture


@functools.cache
def digit_fonts() -> tuple:
    """Font files that come with matplotlib, so that no system font is needed."""
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts/ttf")
    return tuple(
        sorted(str(path) for path in folder.glob("DejaVu*.ttf") if "Display" not in path.name)
    )


@functools.cache
def digit_font(path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, 40)


@functools.cache
def handwritten(rows: tuple) -> dict[int, np.ndarray]:
    """The 8x8 digits of some rows of load_digits, by value."""
    digits = load_digits()
    chosen = np.array(rows)
    return {
        value: digits.images[chosen[digits.target[chosen] == value]] / 16 for value in range(10)
    }


def digit_mask(rng: random.Random, domain: Domain, value: int) -> Image.Image:
    """Alpha mask of a digit that fills a cell, handwritten or drawn with a font."""
    side = rng.randint(26, 31)
    if rng.random() < domain.font_digits:
        cell = Image.new("L", (48, 48))
        font = digit_font(rng.choice(digit_fonts()))
        ImageDraw.Draw(cell).text((24, 24), str(value), fill=255, font=font, anchor="mm")
        if rng.random() < 0.6:  # as coarse as the handwritten ones
            cell = cell.resize((10, 10), Image.Resampling.BOX)
    else:
        cell = Image.fromarray(
            (255 * rng.choice(handwritten(domain.digit_rows)[value])).astype(np.uint8)
        )
    mask = cell.resize((round(side * rng.uniform(0.85, 1.0)), side), Image.Resampling.BICUBIC)
    return mask.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR)


def place_items(scene: Scene) -> list[tuple]:
    """The (column, row) cell of each item, or of the digit; an item with a fixed corner keeps the others out of it.

    A cell is one merged patch: one thing in one image token keeps a tiny model able to learn.
    """
    rng = random.Random(scene.seed)
    columns, rows = scene.size[0] // CELL, scene.size[1] // CELL
    corners = [
        item.place and (item.place[0] * (columns - 1), item.place[1] * (rows - 1))
        for item in scene.items
    ]
    free = [(x, y) for x in range(columns) for y in range(rows) if (x, y) not in corners]
    rng.shuffle(free)
    return [corner or free.pop() for corner in corners] + (
        [free.pop()] if scene.digit is not None else []
    )


def paste_in_cell(
    rng: random.Random, canvas: Image.Image, cell: tuple, mask: Image.Image, color: tuple
) -> None:
    """Paint a mask somewhere within its cell."""
    corner = []
    for number, extent in zip(cell, mask.size, strict=True):
        slack = max(0, CELL - extent) / 2
        corner.append(round(number * CELL + CELL / 2 - extent / 2 + rng.uniform(-slack, slack)))
    canvas.paste(color, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)


def ink(rng: random.Random, canvas: Image.Image) -> tuple:
    """Dark ink on light paper, light ink on dark paper."""
    dark_paper = np.asarray(canvas).mean() < 128
    return tuple(rng.randint(190, 250) if dark_paper else rng.randint(10, 80) for _ in range(3))


def render(scene: Scene, domain: Domain) -> Image.Image:
    """Draw a scene: background, items or a digit, slight blur and noise."""
    rng = random.Random(scene.seed + 1)
    canvas = Image.fromarray(background(rng, scene.size).clip(0, 255).astype(np.uint8))
    cells = place_items(scene)
    for item, cell in zip(scene.items, cells, strict=False):
        mask = item_mask(item, math.radians(rng.uniform(-10, 10)))
        paste_in_cell(rng, canvas, cell, mask, item_color(rng, domain, item.color))
    if scene.digit is not None:
        paste_in_cell(
            rng, canvas, cells[-1], digit_mask(rng, domain, scene.digit), ink(rng, canvas)
        )
    if rng.random() < 0.3:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    noise = np.random.default_rng(scene.seed).standard_normal(
        (scene.size[1], scene.size[0], 3), dtype=np.float32
    )
    pixels = np.asarray(canvas, dtype=np.float32) + rng.uniform(*domain.noise) * noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg_bytes(picture: Image.Image, quality: int) -> bytes:
    """The picture as a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Questions
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Task:
    """A scene with one question about it; the true choice stands first until `make_row` moves it."""

    kind: str
    wordings: list
    choices: list
    scene: Scene
    slots: dict = field(default_factory=dict)

    def questions(self) -> list[str]:
        return [wording.format(**self.slots) for wording in self.wordings]


def new_scene(rng: random.Random, items: list | None = None, digit: int | None = None) -> Scene:
    size = rng.choices([(96, 96), (128, 96), (96, 128)], weights=[6, 2, 2])[0]
    return Scene(size, items or [], digit, rng.getrandbits(32))


def pick(rng: random.Random, values, count: int, without=()) -> list:
    """Distinct values in random order, leaving some out."""
    return rng.sample([value for value in values if value not in without], count)


def bystanders(rng: random.Random, count: int, shapes, colors, radius=(10, 13)) -> list[Item]:
    """Other items of the picture, with shapes and colours that cannot change the answer."""
    shapes, colors = list(shapes), list(colors)
    return [
        Item(rng.choice(shapes), rng.choice(colors), radius=rng.uniform(*radius))
        for _ in range(count)
    ]


def ask_counting(rng: random.Random, domain: Domain, new: int) -> Task:
    window = rng.choice([range(1, 5), range(2, 6)])
    truth, *others = pick(rng, window, 4)
    shape, *other_shapes = pick(rng, SHAPES, 4)
    items = bystanders(rng, truth, [shape], COLORS) + bystanders(
        rng, rng.randint(0, 3), other_shapes, COLORS
    )
    choices = [COUNTS[count][new] for count in (truth, *others)]
    return Task(
        "counting",
        domain.wordings["counting"],
        choices,
        new_scene(rng, items),
        {"x": Noun(SHAPES[shape][0])},
    )


def ask_color(rng: random.Random, domain: Domain, new: int) -> Task:
    colors = pick(rng, COLORS, 4)
    shape, *other_shapes = pick(rng, SHAPES, 4)
    target = Item(shape, colors[0], radius=rng.uniform(11, 14))
    rest = bystanders(rng, rng.randint(1, 2), other_shapes, colors[1:])
    choices = [COLORS[color][new] for color in colors]
    slots = {"x": Noun(SHAPES[shape][0])}
    return Task("color", domain.wordings["color"], choices, new_scene(rng, [target, *rest]), slots)


def ask_ocr(rng: random.Random, domain: Domain, new: int) -> Task:
    digits = pick(rng, DIGITS, 4)
    choices = [DIGITS[digit][new] for digit in digits]
    return Task("ocr", domain.wordings["ocr"], choices, new_scene(rng, digit=digits[0]))


def ask_yesno(rng: random.Random, domain: Domain, new: int) -> Task:
    shape, *other_shapes = pick(rng, SHAPES, 4)
    there = rng.random() < 0.5
    items = [Item(shape, rng.choice(list(COLORS)), radius=rng.uniform(11, 14))] if there else []
    # As many bystanders more as there are targets less: the number of items must not hint at the answer.
    items += bystanders(rng, rng.randint(1, 2) + (not there), other_shapes, COLORS)
    yes, no, *never = VERDICTS[new]
    choices = [yes, no, *never] if there else [no, yes, *never]
    return Task(
        "yesno",
        domain.wordings["yesno"],
        choices,
        new_scene(rng, items),
        {"x": Noun(SHAPES[shape][0])},
    )


def ask_location(rng: random.Random, domain: Domain, new: int) -> Task:
    zones, shapes = pick(rng, ZONES, 4), pick(rng, SHAPES, 4)
    shown = list(zip(shapes, zones, strict=True))[: rng.randint(1, 3)]
    items = [
        Item(s, rng.choice(list(COLORS)), radius=rng.uniform(11, 14), place=zone)
        for s, zone in shown
    ]
    choices = [ZONES[zone][new] for zone in zones]
    scene = new_scene(rng, items)
    return Task(
        "location", domain.wordings["location"], choices, scene, {"x": Noun(SHAPES[shapes[0]][0])}
    )


def ask_attribute(rng: random.Random, domain: Domain, new: int) -> Task:
    shapes, fills = pick(rng, SHAPES, 4), pick(rng, FILLS, 4)
    colors = list(COLORS)
    if rng.random() < 0.5:
        scene = new_scene(rng, bystanders(rng, 1, shapes[:1], colors))
        return Task(
            "attribute",
            domain.wordings["attribute"],
            [SHAPES[shape][new] for shape in shapes],
            scene,
        )
    pairs = list(zip(shapes, fills, strict=True))[: rng.randint(1, 2)]
    items = [
        Item(shape, rng.choice(colors), fill, rng.uniform(12.5, 14.5)) for shape, fill in pairs
    ]
    choices = [FILLS[fill][new] for fill in fills]
    slots = {"x": Noun(SHAPES[shapes[0]][0])}
    return Task(
        "attribute", domain.wordings["attribute_fill"], choices, new_scene(rng, items), slots
    )


def ask_general(rng: random.Random, domain: Domain, new: int) -> Task:
    shapes, colors = pick(rng, SHAPES, 6), pick(rng, COLORS, 7)
    items = [Item(shapes[0], colors[0], radius=rng.uniform(11, 14))]
    items += bystanders(rng, rng.randint(0, 2), shapes[4:], colors[4:])
    names = [
        f"{ADJECTIVES[c]} {SHAPES[s][new]}" for c, s in zip(colors[:4], shapes[:4], strict=True)
    ]
    choices = [f"{Noun(name):이가} 있습니다" for name in names]
    return Task("general", domain.wordings["general"], choices, new_scene(rng, items))


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
    return ASK[kind](rng, domain, int(rng.random() < domain.new_words[kind]))


def make_row(rng: random.Random, task: Task, letter: str, question: str | None = None) -> dict:
    """A table row with the truth at `letter` and the other choices in random order."""
    others = rng.sample(task.choices[1:], 3)
    others.insert(LETTERS.index(letter), task.choices[0])
    question = question or rng.choice(task.questions())
    return {
        "question": question,
        **dict(zip(LETTERS, others, strict=True)),
        "answer": letter,
        "type": task.kind,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The competition's files
# ---------------------------------------------------------------------------------------------------------------------
def draw_split(split: str, count: int, seed: int, new_words: dict | None = None) -> list[dict]:
    """Rows of one split with their task and JPEG bytes; types and answers are balanced, their order is random."""
    rng = random.Random(seed)
    domain = demo_domain(split, new_words)
    plan = [(TYPES[i % len(TYPES)], LETTERS[i // len(TYPES) % 4]) for i in range(count)]
    rng.shuffle(plan)
    rows = []
    for number, (kind, letter) in enumerate(plan, start=1):
        task = make_task(rng, domain, kind)
        name = f"{split}_{number:04d}"
        jpeg = jpeg_bytes(render(task.scene, domain), rng.randint(*domain.quality))
        files = {"id": name, "path": f"{split}/{name}.jpg", "jpeg": jpeg, "task": task}
        rows.append({**files, **make_row(rng, task, letter)})
    return rows


def plant_copy(rng: random.Random, source: dict, target: dict) -> None:
    """Give `target` the picture of `source`, asked about in other words."""
    others = [question for question in source["task"].questions() if question != source["question"]]
    target["jpeg"], target["task"] = source["jpeg"], source["task"]
    target.update(make_row(rng, source["task"], target["answer"], rng.choice(others)))


def plant_copies(train: list[dict], test: list[dict], seed: int) -> None:
    """Three pictures occur twice in train and two in both splits, for the leakage check to find."""
    rng = random.Random(seed)
    sources = rng.sample(range(len(train)), 5)
    for position, source in enumerate(sources):
        pool = train if position < 3 else test
        kind = train[source]["type"]  # the copied row keeps its type, so the types stay balanced
        free = [
            row
            for i, row in enumerate(pool)
            if row["type"] == kind and (pool is test or i not in sources)
        ]
        plant_copy(rng, train[source], rng.choice(free))


def write_csv(path: Path, columns: list[str], rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore", lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)


def write_competition(folder: Path, train: list[dict], test: list[dict]) -> None:
    """Write pictures and tables in the layout of the competition."""
    for name, rows in (("train", train), ("test", test)):
        images = folder / "images" / name
        shutil.rmtree(images, ignore_errors=True)
        images.mkdir(parents=True)
        for row in rows:
            (folder / "images" / row["path"]).write_bytes(row["jpeg"])
    columns = ["id", "path", "question", *LETTERS]
    write_csv(folder / "train.csv", [*columns, "answer"], train)
    write_csv(folder / "test.csv", columns, test)
    write_csv(folder / "test_answers.csv", ["id", "answer", "type"], test)
    write_csv(
        folder / "sample_submission.csv",
        ["id", "answer"],
        [{"id": row["id"], "answer": ""} for row in test],
    )


def check(train: list[dict], test: list[dict]) -> None:
    """Fail unless pictures repeat only where planted and each question is recognised as its type."""
    sys.path.insert(0, str(DATA.parent))
    from vqa_helpers import question_type

    rows = train + test
    hashes = {
        hashlib.sha256(np.asarray(Image.open(io.BytesIO(row["jpeg"]))).tobytes()).digest()
        for row in rows
    }
    assert len(hashes) == len(rows) - 5, "unplanned copies of pictures"
    wrong = {
        (row["type"], row["question"])
        for row in rows
        if question_type(row["question"]) != row["type"]
    }
    assert not wrong, f"question_type disagrees: {sorted(wrong)[:5]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=2040)
    parser.add_argument("--out", type=Path, default=DATA)
    arguments = parser.parse_args()
    train = draw_split("train", TRAIN_ROWS, arguments.seed)
    test = draw_split("test", TEST_ROWS, arguments.seed + 1)
    plant_copies(train, test, arguments.seed + 2)
    check(train, test)
    write_competition(arguments.out, train, test)
    print(f"{len(train)} train and {len(test)} test rows in {arguments.out}")


if __name__ == "__main__":
    main()
