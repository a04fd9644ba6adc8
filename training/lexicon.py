"""Text and fonts that the training pictures may have."""

from __future__ import annotations

from pathlib import Path

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HANZI = "天地人日月水火山石田土木米鱼鸟马牛羊大小上下中口手目心一二三四五六七八九十百千春秋东西南北风云雨"
CHARSET = DIGITS + LETTERS + HANZI
WORDS = [
    "HELLO",
    "APPLE",
    "BREAD",
    "CHAIR",
    "DANCE",
    "EARTH",
    "FLAG",
    "GREEN",
    "HOUSE",
    "ICE",
    "JUICE",
    "KING",
    "LEMON",
    "MUSIC",
    "NIGHT",
    "OCEAN",
    "PAPER",
    "QUEEN",
    "RIVER",
    "STONE",
    "TABLE",
    "UNCLE",
    "VOICE",
    "WATER",
    "XRAY",
    "YELLOW",
    "ZEBRA",
    "OPEN",
    "EXIT",
    "STOP",
    "SALE",
    "TAXI",
    "BUS",
    "CAFE",
    "BOOK",
    "FISH",
    "MILK",
    "TEA",
    "RICE",
    "CAKE",
    "SHOP",
    "BANK",
    "PARK",
    "ROAD",
    "ZOO",
    "HOTEL",
    "PHONE",
    "LIGHT",
    "SOUTH",
    "NORTH",
    "EAST",
    "WEST",
]

DEJAVU = Path("/usr/share/fonts/truetype/dejavu")
LATIN_FONTS = [
    "",
    "",
    *(str(DEJAVU / f"DejaVu{name}.ttf") for name in ("Sans", "Sans-Bold", "Serif", "SansMono")),
]
HANZI_FONTS = ["/usr/share/fonts/truetype/wqy/wqy-microhei.ttc"]


LEVELS = {
    "calm digits": {"shares": (1.0, 0.0, 0.0, 0.0), "calm": True},
    "digits": {"shares": (1.0, 0.0, 0.0, 0.0)},
    "latin": {"shares": (0.6, 0.25, 0.15, 0.0)},
    "all": {"shares": (0.4, 0.2, 0.15, 0.25)},
}


def check_hanzi_font(user: str, remedy: str = "") -> None:
    """Raise a FileNotFoundError that names what prints Chinese, if there is no font for it."""
    missing = [name for name in HANZI_FONTS if not Path(name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]}: {user} prints Chinese and needs this font; install Debian's fonts-wqy-microhei{remedy}"
        )


def scene_options(level: str) -> dict:
    """Arguments of `random_scene` for a level of difficulty.

    Latin fonts that are not installed (Debian's fonts-dejavu-core) are left out.

    Raises
    ------
    FileNotFoundError
        If there are Chinese characters to print and no font for them.
    """
    if LEVELS[level]["shares"][3]:
        check_hanzi_font(f"level {level!r}", "; or choose --level latin")
    return {
        "fonts": [name for name in LATIN_FONTS if not name or Path(name).exists()],
        "hanzi_fonts": HANZI_FONTS,
        "words": WORDS,
        "hanzi": HANZI,
        **LEVELS[level],
    }
