"""Sample chats that a server counts when it comes up, so that the estimate knows its tokenizer before any traffic.

They cover what tokenizers and templates differ in most: scripts, code, numbers, tools, calls, and images.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

Body = dict[str, Any]

_PROSE = (
    "Please read the following notes from our last meeting and write a short summary for people who could not attend. We "
    "agreed that the new schedule starts in April, that every team keeps its own calendar, and that questions about pay go to "
    "the office first. Nobody objected to the change of rooms, although several people asked whether the larger kitchen would "
    "be available before the summer. Keep the tone friendly, avoid long sentences, and end with a list of what happens next.",
    "The theory assumes that each particle moves independently of the others, which is a reasonable approximation at low "
    "density. As the pressure increases, collisions become frequent and the distribution of velocities approaches the one that "
    "Maxwell described. Experiments confirm this within the accuracy of the instruments, except near the walls of the vessel, "
    "where temperature gradients introduce systematic errors that the authors discuss in the appendix.",
    "What's the best way to learn to cook if you've never done it before? I'd start with soups: they're cheap, they forgive "
    "mistakes, and you'll taste what each ingredient does. Don't buy special equipment. A sharp knife, one good pot and a wooden "
    "spoon are enough. Once you're comfortable, try bread. It isn't hard, it just takes time, and there's nothing like the smell.",
    "# Release notes\n\n## Added\n\n- **Search** finds words in attachments.\n- Exports can be scheduled (see the "
    "[guide](https://example.org/guide)).\n\n## Fixed\n\n1. Dates before 1970 sort correctly.\n2. `Ctrl+F` no longer closes "
    "the sidebar.\n\n> Upgrading from version 3? Read the migration page first.\n",
)

_TEXTS = (
    *_PROSE,
    "The harbour was quiet in the early morning, and only the gulls noticed the small boat that came in with the tide. Two "
    "sailors tied it to the pier, carried the nets up the stairs, and went to look for coffee and a dry place to sit.",
    'To install the heat pump, mount the bracket 30 cm above ground, connect the 3/8" line first, then purge for 15 min. '
    "Warranty: 24 months; see section 7.2 (b) for exclusions, and call +44 20 7946 0018 between 9:00 and 17:30.",
    "def merge(left, right):\n    result = []\n    while left and right:\n        source = left if left[0] <= right[0] "
    "else right\n        result.append(source.pop(0))\n    return result + left + right\n\n\nclass Stack:\n    "
    "def __init__(self) -> None:\n        self._items: list[int] = []\n",
    "SELECT c.name, SUM(o.total) AS revenue FROM customers c JOIN orders o ON o.customer_id = c.id WHERE o.created_at >= "
    "'2024-01-01' GROUP BY c.name HAVING SUM(o.total) > 1000 ORDER BY revenue DESC LIMIT 20;",
    '{"id": 48213, "status": "shipped", "items": [{"sku": "AX-77", "qty": 2, "price": 19.95}, {"sku": "B-3", "qty": 1}], '
    '"address": {"city": "Porto", "zip": "4050-123"}, "gift": false, "note": null}',
    "time,latency_ms,errors\n10:00:01,12.7,0\n10:00:02,13.1,0\n10:00:03,250.9,3\n10:00:04,11.8,0\n10:00:05,12.2,1\n",
    "2024-03-11T08:15:42Z WARN worker-3 retry 2/5 after timeout (1500 ms) request_id=9f8c2b1e-77aa-4d0e-9c1b-5e2f6a7d8c90",
    "iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4//8/w38GIAXDIBKE0DHxgljNBAAO9TXL0Y4OHwAAAABJRU5ErkJggg",
    "山脚下有一个小村子，村里的人每天清晨去河边取水。老木匠修好了那座旧桥，从此孩子们上学不必再绕远路。",
    "我想把这份报告改写得更正式一些，同时保留第三部分的数据表格，并在结尾加上两条建议。",
    "駅前の古い書店は今月で閉店するそうです。子供の頃に毎週通った場所なので、少し寂しい気持ちになりました。",
    "비가 그친 뒤 시장 골목에는 따뜻한 국밥 냄새가 퍼졌고, 사람들은 우산을 접으며 가게 안으로 들어갔다.",
    "Поезд отправился с опозданием на двадцать минут, и пассажиры успели выпить чаю и обсудить последние новости.",
    "Το μικρό νησί έχει τρία χωριά, ένα λιμάνι και έναν φάρο που ανάβει κάθε βράδυ λίγο πριν νυχτώσει.",
    "وصل الطبيب إلى القرية قبل الغروب، وفحص المرضى واحدا تلو الآخر، ثم كتب تقريرا قصيرا عن حالة كل منهم.",
    "הספרייה העירונית תהיה סגורה ביום ראשון, אבל אפשר להחזיר ספרים דרך התיבה שליד הכניסה הראשית.",
    "बरसात के बाद खेतों में हरियाली छा गई और किसान अगली फसल की तैयारी में जुट गए।",
    "ตลาดเช้าริมแม่น้ำเปิดตั้งแต่ตีห้า มีผลไม้สด ปลา และขนมพื้นบ้านขายในราคาย่อมเยา",
    "Der Zug nach München fährt wegen Bauarbeiten von Gleis sieben ab; die Fahrgäste werden um Verständnis gebeten. Größere "
    "Gepäckstücke gehören in den vorderen Wagen.",
    "La bibliothécaire a retrouvé, derrière une étagère poussiéreuse, un carnet écrit à la plume où l'été précédent était "
    "raconté jour après jour. C'était déjà très touchant.",
    "El señor de la panadería nos contó que mañana habrá pan de maíz, y que los niños podrán ayudar a decorar las galletas.",
    "Trời mưa suốt buổi sáng nên buổi họp được chuyển sang chiều; mọi người mang theo tài liệu đã chuẩn bị từ tuần trước.",
    "Pociąg dojechał na miejsce późno wieczorem, więc goście zjedli żurek i poszli spać bez rozpakowywania walizek.",
    "Great news 🎉🎉 the launch went well! 🚀 Thanks everyone 🙏✨ see you at 18:00 😀 → bring cake 🍰",
)

_TOOLS: tuple[Body, ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": properties, "required": list(properties)[:1]},
        },
    }
    for name, description, properties in (
        (
            "find_flights",
            "Find flights between two airports on a given day. Returns at most ten results, cheapest first.",
            {
                "origin": {"type": "string", "description": "IATA code of the airport of departure"},
                "destination": {"type": "string", "description": "IATA code of the airport of arrival"},
                "day": {"type": "string", "format": "date"},
                "cabin": {"type": "string", "enum": ["economy", "business", "first"]},
            },
        ),
        (
            "read_file",
            "Read a text file of the workspace, or some of its lines.",
            {
                "path": {"type": "string", "description": "Path relative to the root of the workspace"},
                "start_line": {"type": "integer", "minimum": 1},
                "end_line": {"type": ["integer", "null"], "minimum": 1},
            },
        ),
        (
            "run_tests",
            "Run the tests that match a pattern and return the failures with their tracebacks.",
            {"pattern": {"type": "string"}, "timeout_s": {"type": "number", "default": 60}},
        ),
        (
            "create_ticket",
            _PROSE[1],
            {
                "title": {
                    "type": "string",
                    "description": "A summary in at most ten words, without the product's name.",
                },
                "labels": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
                "priority": {
                    "anyOf": [{"type": "integer", "minimum": 1, "maximum": 4}, {"type": "null"}],
                    "default": None,
                },
                "reporter": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}, "email": {"type": "string", "format": "email"}},
                    "additionalProperties": False,
                },
            },
        ),
        (
            "translate",
            _PROSE[2],
            {
                "text": {"type": "string", "description": "What to translate. Markdown is kept as it is."},
                "target_language": {"type": "string", "description": "ISO 639-1 code, such as de or ja"},
                "formal": {"type": "boolean", "default": False, "title": "Formal"},
            },
        ),
    )
)

_IMAGE_SIZES = ((224, 224), (640, 480), (1024, 768), (1600, 1200))


def sample_chats() -> Iterator[Body]:
    """Yield the chats. All of them are valid for any model with a chat template, except for tools and images."""
    for text in _TEXTS:
        yield {"messages": [_user(text)]}
    yield {"messages": [_user("hi")]}
    for one, other in pairwise(_TEXTS):
        answer = {"role": "assistant", "content": other}
        yield {"messages": [{"role": "system", "content": _TEXTS[0]}, _user(one), answer, _user(one + "\n\n" + other)]}
    for count in range(2, len(_PROSE) + 1):
        yield {"messages": [_user("\n\n".join(_PROSE[:count]))]}
        yield {"messages": [{"role": "system", "content": _PROSE[0]}, *map(_user, _PROSE[:count])]}
    for count in range(1, len(_TOOLS) + 1):
        yield {"messages": [_user(_TEXTS[count])], "tools": list(_TOOLS[:count])}
    for count in range(1, 4):
        yield {"messages": _tool_history(count), "tools": list(_TOOLS)}
    for form in _TOOLS:
        schema = {"name": "answer", "schema": form["function"]["parameters"]}
        yield {"messages": [_user(_TEXTS[1])], "response_format": {"type": "json_schema", "json_schema": schema}}
    for width, height in _IMAGE_SIZES:
        image = {"type": "image_url", "image_url": {"url": _png(width, height)}}
        yield {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}, image]}]}


def _user(text: str) -> Body:
    return {"role": "user", "content": text}


def _tool_history(count: int) -> list[Body]:
    """Return a chat in which the model has called ``count`` tools."""
    calls = [
        {
            "id": f"call00{n:03}",
            "type": "function",
            "function": {
                "name": "read_file",
                "arguments": f'{{"path": "src/part_{n}.py", "start_line": {10 * n + 1}}}',
            },
        }
        for n in range(count)
    ]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": _TEXTS[2]} for call in calls]
    return [_user(_TEXTS[0]), {"role": "assistant", "content": "", "tool_calls": calls}, *results]


def _png(width: int, height: int) -> str:
    """Return a white PNG as a data URL."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress((b"\0" + b"\xff" * width) * height, 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()
