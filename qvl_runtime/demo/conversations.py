"""Questions about scenes, with their true answers, in English and Chinese.

Every question function takes the random generator, a language and one or more scenes. It returns an `Exchange`, or None
if the scene does not allow the question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from qvl_runtime.demo.scenes import COLORS, SHAPES, Scene, Thing

LANGUAGES = ("en", "zh")
ZH = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "diamond": "菱形", "cross": "十字形",
    "ring": "圆环", "heart": "心形", "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色",
    "purple": "紫色", "white": "白色", "black": "黑色", "small": "小的", "large": "大的", "object": "物体",
    "left": "左边", "right": "右边", "above": "上面", "below": "下面",
}  # fmt: skip
Rng = np.random.Generator
T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """One or two turns of question and answer; `skill` is what the last question tests."""

    skill: str
    language: str
    turns: tuple[tuple[str, str], ...]


def one(skill: str, language: str, question: str, answer: str) -> Exchange:
    return Exchange(skill, language, ((question, answer),))


def pick(rng: Rng, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def word(name: str, language: str) -> str:
    return ZH[name] if language == "zh" else name


def box_text(box: Sequence[float]) -> str:
    """`<box>(x1,y1),(x2,y2)</box>`, a unit-square box in multiples of 10 thousandths."""
    x1, y1, x2, y2 = (min(990, max(0, round(v * 100) * 10)) for v in box)
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def kind(language: str, size: str = "", color: str = "", shape: str = "") -> str:
    """A bare noun phrase: small red circle; 小的红色圆形; red object; 红色的物体."""
    if language == "en":
        return " ".join(x for x in (size, color, shape or "object") if x)
    if not shape:
        return (ZH[size] if size else "") + (ZH[color] + "的" if color else "") + "物体"
    return "".join(ZH[x] for x in (size, color, shape) if x)


def indefinite(noun: str, language: str) -> str:
    if language == "zh":
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def full(thing: Thing, language: str) -> str:
    """a small red circle; 小的红色圆形."""
    return indefinite(kind(language, thing.size, thing.color, thing.shape), language)


def matching(scene: Scene, size: str = "", color: str = "", shape: str = "") -> list[Thing]:
    return [
        t
        for t in scene.things
        if (not size or t.size == size) and (not color or t.color == color) and (not shape or t.shape == shape)
    ]


def references(scene: Scene, thing: Thing) -> list[dict[str, str]]:
    """The attribute sets that match only this thing, shortest first."""
    options = [
        {"shape": thing.shape},
        {"color": thing.color},
        {"color": thing.color, "shape": thing.shape},
        {"size": thing.size, "shape": thing.shape},
        {"size": thing.size, "color": thing.color, "shape": thing.shape},
    ]
    return [o for o in options if len(matching(scene, **o)) == 1]


def refer(rng: Rng, scene: Scene, language: str, without: str = "") -> tuple[Thing, str] | None:
    """A thing and a definite phrase that matches only it, without the attribute `without`."""
    for i in rng.permutation(len(scene.things)):
        thing = scene.things[i]
        options = [o for o in references(scene, thing) if without not in o]
        if options:
            noun = kind(language, **pick(rng, options[:3]))
            return thing, noun if language == "zh" else f"the {noun}"
    return None


def missing(rng: Rng, scene: Scene) -> dict[str, str]:
    """Attributes that nothing in the scene has, often a near miss."""
    colors = [t.color for t in scene.things] or list(COLORS)
    shapes = [t.shape for t in scene.things] or list(SHAPES)
    for _ in range(20):
        near = rng.random()
        color = pick(rng, colors if near < 0.6 else list(COLORS))
        shape = pick(rng, shapes if 0.3 < near < 0.8 else SHAPES)
        wanted = pick(rng, [{"color": color, "shape": shape}] * 2 + [{"shape": shape}])
        if not matching(scene, **wanted):
            return wanted
    unused = [s for s in SHAPES if s not in shapes]
    return {"shape": pick(rng, unused)}


def left_to_right(scene: Scene) -> list[Thing]:
    return sorted(scene.things, key=lambda t: t.center[0])


def describe(rng: Rng, language: str, scene: Scene) -> Exchange:
    parts = [full(t, language) for t in left_to_right(scene)]
    if scene.text:
        joined = " ".join(scene.text.lines)
        parts.append(f"文字“{joined}”" if language == "zh" else f'the text "{joined}"')
    if not parts:
        parts = ["空白"] if language == "zh" else ["nothing"]
    if language == "zh":
        return one("describe", language, pick(rng, ["描述这张图。", "图里有什么？"]), "、".join(parts) + "。")
    question = pick(rng, ["Describe the picture.", "What is in the picture?"])
    return one("describe", language, question, ", ".join(parts) + ".")


def ground(rng: Rng, language: str, scene: Scene) -> Exchange | None:
    if not 1 <= len(scene.things) <= 5 or (len(scene.things) > 3 and rng.random() < 0.5):
        return None
    parts = [f"<ref>{full(t, language)}</ref>{box_text(t.box)}" for t in left_to_right(scene)]
    question = "描述这张图并标出物体。" if language == "zh" else "Describe the picture with boxes."
    return one("ground", language, question, "".join(parts))


def find(rng: Rng, language: str, scene: Scene) -> Exchange | None:
    if scene.text and rng.random() < 0.2:
        phrase, box = ("文字" if language == "zh" else "the text"), scene.text.box
    else:
        found = refer(rng, scene, language)
        if not found:
            return None
        phrase, box = found[1], found[0].box
    question = pick(
        rng,
        [f"找到{phrase}。", f"{phrase}在哪里？"] if language == "zh" else [f"Find {phrase}.", f"Where is {phrase}?"],
    )
    return one("find", language, question, f"<ref>{phrase}</ref>{box_text(box)}")


def name(rng: Rng, language: str, scene: Scene) -> Exchange | None:
    if not scene.things:
        return None
    thing = pick(rng, scene.things)
    box = box_text(thing.box)
    question = f"{box}里是什么？" if language == "zh" else f"What is in {box}?"
    return one("name", language, question, full(thing, language))


def count(rng: Rng, language: str, scene: Scene) -> Exchange | None:
    wanted: dict[str, str] = {}
    choice = rng.random()
    if scene.things and choice < 0.75:
        counted = [
            (len(matching(scene, **o)), o)
            for t in scene.things
            for o in ({"color": t.color}, {"shape": t.shape}, {"color": t.color, "shape": t.shape})
        ]
        several = [c for c in counted if c[0] > 1]
        wanted = pick(rng, several if several and rng.random() < 0.6 else counted)[1]
    elif choice < 0.82:
        wanted = missing(rng, scene)
    number = len(matching(scene, **wanted))
    noun = kind(language, **wanted)
    if language == "zh":
        return one("count", language, pick(rng, [f"图中有几个{noun}？", f"有多少个{noun}？"]), str(number))
    plural = "crosses" if noun.endswith("cross") else noun + "s"
    plural = noun[:-5] + plural if noun.endswith("cross") and len(noun) > 5 else plural
    return one("count", language, f"How many {plural} are there?", str(number))


def color(rng: Rng, language: str, scene: Scene) -> Exchange | None:
    found = refer(rng, scene, language, without="color")
    if not found:
        return None
    question = f"{found[1]}是什么颜色？" if language == "zh" else f"What color is {found[1]}?"
    return one("color", language, question, word(found[0].color, language))


def shape(rng: Rng, language: str, scene: Scene) -> Exchange | None:
    found = refer(rng, scene, language, without="shape")
    if not found:
        return None
    question = f"{found[1]}是什么形状？" if language == "zh" else f"What shape is {found[1]}?"
    return one("shape", language, question, word(found[0].shape, language))


def size(rng: Rng, language: str, scene: Scene) -> Exchange | None:
    found = refer(rng, scene, language, without="size")
    if not found:
        return None
    question = f"{found[1]}是大的还是小的？" if language == "zh" else f"Is {found[1]} small or large?"
    return one("size", language, question, word(found[0].size, language))


def position(rng: Rng, language: str, scene: Scene) -> Exchange | None:
    if len(scene.things) < 2:
        return None
    if rng.random() < 0.3:
        axis, sign, en, zh = pick(
            rng,
            [
                (0, 1, "leftmost", "最左边"),
                (0, -1, "rightmost", "最右边"),
                (1, 1, "top", "最上面"),
                (1, -1, "bottom", "最下面"),
            ],
        )
        order = sorted(scene.things, key=lambda t: sign * t.center[axis])
        if abs(order[0].center[axis] - order[1].center[axis]) < 0.06:
            return None
        question = f"{zh}的物体是什么？" if language == "zh" else f"What is the {en} object?"
        return one("position", language, question, full(order[0], language))
    first, second = refer(rng, scene, language), refer(rng, scene, language)
    if not first or not second or first[0] is second[0]:
        return None
    axis = int(rng.integers(2))
    gap = first[0].center[axis] - second[0].center[axis]
    if abs(gap) < 0.08:
        return None
    pair = (("left", "right"), ("above", "below"))[axis]
    answer = word(pair[gap > 0], language)
    if language == "zh":
        question = f"{first[1]}在{second[1]}的{ZH[pair[0]]}还是{ZH[pair[1]]}？"
    elif axis == 0:
        question = f"Is {first[1]} left or right of {second[1]}?"
    else:
        question = f"Is {first[1]} above or below {second[1]}?"
    return one("position", language, question, answer)


def read(rng: Rng, language: str, scene: Scene) -> Exchange | None:
    if not scene.text:
        return None
    question = pick(
        rng, ["图中写的是什么？", "读出文字。"] if language == "zh" else ["What does the text say?", "Read the text."]
    )
    return one("read", language, question, "\n".join(scene.text.lines))


def present(rng: Rng, language: str, scene: Scene) -> Exchange | None:
    yes = bool(scene.things) and rng.random() < 0.5
    wanted = missing(rng, scene)
    if yes:
        thing = pick(rng, scene.things)
        wanted = pick(rng, [{"shape": thing.shape}, {"color": thing.color, "shape": thing.shape}])
    noun = kind(language, **wanted)
    if language == "zh":
        return one("present", language, f"图中有{noun}吗？", "有" if yes else "没有")
    return one("present", language, f"Is there {indefinite(noun, language)}?", "yes" if yes else "no")


def absent(rng: Rng, language: str, scene: Scene) -> Exchange:
    noun = kind(language, **missing(rng, scene))
    if language == "zh":
        return one("absent", language, pick(rng, [f"找到{noun}。", f"{noun}在哪里？"]), f"没有{noun}。")
    question = pick(rng, [f"Find the {noun}.", f"Where is the {noun}?"])
    return one("absent", language, question, f"There is no {noun}.")


def second(rng: Rng, language: str, scene: Scene) -> Exchange | None:
    zh = language == "zh"
    first, attribute = pick(rng, [(color, "color"), (shape, "shape"), (size, "size"), (None, "")])
    found = refer(rng, scene, language, without=attribute or "none")
    if not found:
        return None
    thing, phrase = found
    if first is None:
        question = f"{phrase}在哪里？" if zh else f"Where is {phrase}?"
        turn = (question, f"<ref>{phrase}</ref>{box_text(thing.box)}")
    else:
        asked = {
            "color": (f"What color is {phrase}?", f"{phrase}是什么颜色？"),
            "shape": (f"What shape is {phrase}?", f"{phrase}是什么形状？"),
            "size": (f"Is {phrase} small or large?", f"{phrase}是大的还是小的？"),
        }[attribute]
        turn = (asked[zh], word(getattr(thing, attribute), language))
    left = [a for a in ("color", "shape", "size", "where") if a != attribute and not (a == "where" and first is None)]
    then = pick(
        rng, [a for a in left if a not in ("color", "shape") or word(getattr(thing, a), language) not in phrase]
    )
    questions = {
        "color": ("What color is it?", "它是什么颜色？"),
        "shape": ("What shape is it?", "它是什么形状？"),
        "size": ("Is it small or large?", "它是大的还是小的？"),
        "where": ("Where is it?", "它在哪里？"),
    }
    if then == "where":
        answer = f"<ref>{phrase}</ref>{box_text(thing.box)}"
    else:
        answer = word(getattr(thing, then), language)
    return Exchange("second", language, (turn, (questions[then][zh], answer)))


def compare(rng: Rng, language: str, *scenes: Scene) -> Exchange | None:
    zh = language == "zh"
    choice = rng.random()
    if choice < 0.3:
        counts = [len(s.things) for s in scenes]
        if sorted(counts)[-1] == sorted(counts)[-2]:
            return None
        question = "哪张图的物体最多？" if zh else "Which picture has the most objects?"
        return one("compare", language, question, str(counts.index(max(counts)) + 1))
    if choice < 0.65:
        which = int(rng.integers(len(scenes)))
        if not scenes[which].things:
            return None
        thing = pick(rng, scenes[which].things)
        wanted = pick(rng, [{"shape": thing.shape}, {"color": thing.color, "shape": thing.shape}])
        if sum(bool(matching(s, **wanted)) for s in scenes) != 1:
            return None
        noun = kind(language, **wanted)
        question = f"哪张图里有{noun}？" if zh else f"Which picture has {indefinite(noun, language)}?"
        return one("compare", language, question, str(which + 1))
    which = int(rng.integers(len(scenes)))
    inner = pick(rng, [color, shape, count])(rng, language, scenes[which])
    if not inner:
        return None
    question, answer = inner.turns[0]
    prefix = f"第{which + 1}张图：" if zh else f"In picture {which + 1}: "
    return one("compare", language, prefix + question, answer)


SINGLE: dict[str, tuple[Callable[..., Exchange | None], float]] = {
    "describe": (describe, 0.5),
    "ground": (ground, 1.5),
    "find": (find, 2.5),
    "name": (name, 1.0),
    "count": (count, 1.5),
    "color": (color, 1.0),
    "shape": (shape, 0.5),
    "size": (size, 0.4),
    "position": (position, 1.5),
    "read": (read, 4.0),
    "present": (present, 0.5),
    "absent": (absent, 0.4),
    "second": (second, 0.6),
}
"""Question function and training weight of every skill on one picture."""


def ask(rng: Rng, scenes: list[Scene], skill: str = "") -> Exchange | None:
    """A random question about one picture, or a comparison of several."""
    language = pick(rng, LANGUAGES)
    if len(scenes) > 1:
        return compare(rng, language, *scenes)
    names = [skill] if skill else list(SINGLE)
    weights = np.array([SINGLE[n][1] for n in names])
    return SINGLE[str(rng.choice(names, p=weights / weights.sum()))][0](rng, language, scenes[0])
