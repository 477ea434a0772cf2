"""Real texts to build prompts from: prose, code, JSON schemas, logs, and paragraphs in other languages.

All of them come with Python, with packages that the project installs, or with this module. Every source belongs to one
of two halves, so that what is evaluated shares no text with what was learned.
"""

from __future__ import annotations

import inspect
import json
import pydoc_data.topics
import random
import re
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HALVES = (0, 1)
"""Learned from, and evaluated on."""

_MODULES = (
    "subprocess",
    "shutil",
    "json",
    "os.path",
    "sqlite3",
    "tempfile",
    "zipfile",
    "smtplib",
    "statistics",
    "textwrap",
)
"""Modules of the standard library whose functions become tools."""

_SENTENCES = {
    "Chinese": (
        "人工智能正在改变我们的生活方式。大型语言模型能够理解和生成自然语言，因此被广泛应用于客服、翻译、写作和编程等领域。",
        "然而，在高负载的情况下，服务器往往无法满足所有用户的延迟要求。",
        "请用简单的语言解释一下什么是注意力机制，并举两个例子说明它在机器翻译中的作用。",
        "今天下午三点我们在会议室讨论下个季度的销售计划，请大家提前准备好各自部门的数据。",
        "这家餐厅的红烧肉做得非常地道，肥而不腻，入口即化，难怪每天门口都排着长队。",
        "根据《劳动合同法》第三十九条的规定，劳动者严重违反用人单位规章制度的，用人单位可以解除劳动合同。",
        "春天来了，公园里的樱花全都开了，孩子们在草地上放风筝，老人们坐在长椅上聊天。",
        "如果订单在48小时内没有发货，您可以在“我的订单”页面申请退款，款项将在3至5个工作日内退回。",
    ),
    "Japanese": (
        "人工知能は私たちの生活を大きく変えています。大規模言語モデルは自然な文章を理解し、生成することができます。",
        "しかし、多くのユーザーが同時にアクセスすると、応答が遅くなることがあります。",
        "明日の会議の資料を三ページ以内でまとめてください。グラフは一つだけで結構です。",
        "この電車は次の駅で急行の通過待ちをいたしますので、しばらく停車いたします。",
        "お問い合わせいただいた件につきまして、担当者から改めてご連絡差し上げます。",
        "母が作ってくれた味噌汁の香りで目が覚めた朝のことを、今でもはっきりと覚えている。",
    ),
    "Korean": (
        "인공지능은 우리의 생활 방식을 크게 바꾸고 있습니다. 대규모 언어 모델은 자연어를 이해하고 생성할 수 있습니다.",
        "그러나 많은 사용자가 동시에 접속하면 응답 속도가 느려질 수 있습니다.",
        "내일 회의 자료를 세 쪽 이내로 정리해 주세요. 표는 마지막 쪽에 넣으면 됩니다.",
        "주문하신 상품은 오늘 오후에 출고되며, 배송까지 이틀 정도 걸릴 예정입니다.",
    ),
    "Russian": (
        "Искусственный интеллект меняет нашу жизнь. Большие языковые модели понимают и создают тексты.",
        "Однако при высокой нагрузке серверы часто не успевают отвечать вовремя.",
        "Пожалуйста, подготовьте краткий отчёт о продажах за третий квартал и пришлите его до пятницы.",
        "Вечером мы гуляли по набережной, смотрели на разводные мосты и говорили о книгах.",
    ),
    "Arabic": (
        "يغير الذكاء الاصطناعي حياتنا بسرعة. تستطيع النماذج اللغوية الكبيرة فهم النصوص وإنشاءها.",
        "لكن الخوادم لا تستطيع دائما تلبية جميع الطلبات في الوقت المناسب.",
        "أرجو إرسال تقرير المبيعات قبل نهاية الأسبوع مع ملخص قصير باللغة الإنجليزية.",
        "كانت المدينة القديمة هادئة في الصباح، ورائحة الخبز تملأ الشوارع الضيقة.",
    ),
    "German": (
        "Künstliche Intelligenz verändert unser Leben grundlegend. Große Sprachmodelle verstehen und erzeugen Texte.",
        "Bei hoher Last können Server die Anforderungen an die Antwortzeit jedoch häufig nicht erfüllen.",
        "Bitte fassen Sie die Geschäftsbedingungen der Haftpflichtversicherung in drei Sätzen zusammen.",
        "Am Wochenende fahren wir mit dem Regionalzug in die Berge und übernachten in einer Hütte.",
    ),
    "French": (
        "L'intelligence artificielle transforme notre façon de vivre. Les grands modèles produisent du texte.",
        "Voilà une idée intéressante à développer, à condition que le délai de réponse reste raisonnable.",
        "Pourriez-vous résumer ce contrat de location en cinq points et signaler les clauses inhabituelles ?",
        "Le marché du samedi sent le pain chaud, les pêches mûres et le café que l'on boit debout.",
    ),
}
EAST_ASIAN = ("Chinese", "Japanese", "Korean")
OTHER_LANGUAGES = ("Russian", "Arabic", "German", "French")


@dataclass(frozen=True)
class Texts:
    """The sources of one half."""

    prose: tuple[str, ...]
    code: tuple[str, ...]
    schemas: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...]
    sentences: dict[str, tuple[str, ...]]

    def piece(self, rng: random.Random, sources: tuple[str, ...], most: int) -> str:
        """Return a random part of a random source, of at most ``most`` characters, that begins at a line or word."""
        text = rng.choice(sources)
        length = rng.randint(most // 8, most)
        start = rng.randrange(max(1, len(text) - length))
        start = max(text.rfind("\n", 0, start), text.rfind(". ", 0, start) + 1) + 1
        return text[start : start + length].strip() or "Continue."

    def paragraph(self, rng: random.Random, languages: tuple[str, ...]) -> str:
        """Return one to eight sentences of one of ``languages``."""
        sentences = self.sentences[rng.choice(languages)]
        return " ".join(rng.choice(sentences) for _ in range(rng.randint(1, 8)))


@cache
def texts(half: int) -> Texts:
    """Return the sources of ``half`` (one of `HALVES`)."""
    return Texts(
        prose=tuple(_prose()[half::2]),
        code=tuple(_code()[half::2]),
        schemas=tuple(_schemas()[half::2]),
        tools=tuple(_function_tools()[half::2]),
        sentences={language: sentences[half::2] for language, sentences in _SENTENCES.items()},
    )


@cache
def _prose() -> list[str]:
    """Return Python's language reference as plain paragraphs."""
    topics = [re.sub(r"(?<!\n)\n(?!\n)", " ", text) for _, text in sorted(pydoc_data.topics.topics.items())]
    return [re.sub(r" {2,}", " ", text) for text in topics if len(text) > 1200]


@cache
def _code() -> list[str]:
    """Return source files of the standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [text for file in files if 4000 < len(text := file.read_text(encoding="utf-8", errors="replace")) < 100_000]


@cache
def _schemas() -> list[dict[str, Any]]:
    """Return the JSON schemas of the types of OpenAI's client and of the gateway's configuration."""
    import openai.types.chat
    import openai.types.responses
    from pydantic import BaseModel

    from gateway.config import engines, keys, observability, policies, schema, server

    found = []
    for modules in (
        (openai.types.chat,),
        (openai.types.responses,),
        (engines, keys, observability, policies, schema, server),
    ):
        members = {name: model for module in modules for name, model in inspect.getmembers(module, inspect.isclass)}
        for _, model in sorted(members.items()):
            if issubclass(model, BaseModel) and model is not BaseModel:
                document = model.model_json_schema()
                if 300 < len(json.dumps(document)) < 6000:
                    found.append(document)
    return found


@cache
def _function_tools() -> list[dict[str, Any]]:
    """Return functions of the standard library as tools: their name, documentation and parameters."""
    found = []
    for name in _MODULES:
        module = __import__(name, fromlist=["_"])
        for function_name, function in sorted(inspect.getmembers(module, inspect.isroutine)):
            try:
                parameters = inspect.signature(function).parameters
            except (TypeError, ValueError):
                continue
            if function_name.startswith("_") or not function.__doc__ or not parameters:
                continue
            found.append(_tool(f"{name.replace('.', '_')}_{function_name}", function.__doc__, list(parameters)))
    return found


def _tool(name: str, documentation: str, parameters: list[str]) -> dict[str, Any]:
    properties = {p: {"type": "string", "description": f"The {p.replace('_', ' ')} to use."} for p in parameters}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": inspect.cleandoc(documentation)[:600],
            "parameters": {"type": "object", "properties": properties, "required": parameters[:1]},
        },
    }
