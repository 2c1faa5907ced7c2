"""Corpora whose components are known: rows of topics, each with its own words and sentences, in English and Chinese."""

from __future__ import annotations

import random

# name -> (words, sentences that take them)
TOPICS: dict[str, tuple[str, list[str]]] = {
    "sailing": (
        "jib mainsail rudder keel anchor harbour skipper tide mast compass buoy winch hull gale",
        ["How do I set the {} in a strong {}?", "The {} broke near the {}.", "Check your {} before you leave the {}."],
    ),
    "baking": (
        "yeast sourdough crust icing muffin rye caramel batter pastry almond vanilla brioche meringue tin",
        ["Bake the {} until the {} is golden.", "Can I replace {} by {}?", "Write a recipe with {} and {}."],
    ),
    "courts": (
        "plaintiff verdict appeal jury statute witness contract damages injunction clause lawyer tort bail hearing",
        ["Did the {} accept the {}?", "Summarise this {} for a {}.", "What does the {} say about the {}?"],
    ),
    "networks": (
        "router packet latency firewall subnet gateway socket proxy bandwidth ethernet switch port cache ping",
        ["Why does my {} drop every {}?", "Configure a {} behind a {}.", "Trace the {} through this {}."],
    ),
    "birds": (
        "robin heron falcon nest plumage migration owl sparrow wetland feather egg beak finch swallow",
        ["We saw a {} beside the {}.", "Which {} has a red {}?", "Tell me where a {} builds its {}."],
    ),
    "chess": (
        "bishop rook gambit checkmate knight pawn castling endgame opening fork queen tempo blunder rating",
        ["Black gives up the {} for a {}.", "Is this {} better than a {}?", "Analyse the {} after the {}."],
    ),
    "旅行": (
        "机票 酒店 护照 签证 行李 导游 海滩 古镇 火车 地铁 景点 门票 民宿 航班",
        ["去那里要带{}和{}吗？", "帮我预订{}，再查一下{}。", "当地的{}离{}很近。"],
    ),
    "法律": (
        "原告 被告 合同 判决 上诉 证据 赔偿 律师 法院 债务 抵押 仲裁 条款 诉讼",
        ["根据{}，{}应当如何处理？", "{}不服，提出了{}。", "本案的{}与{}无关。"],
    ),
    "农业": (
        "小麦 灌溉 化肥 收割 播种 土壤 温室 果树 害虫 水稻 玉米 农药 拖拉机 牧草",
        ["今年的{}需要多少{}？", "春天先准备{}，然后照看{}。", "{}太多会伤害{}。"],
    ),
    "编程": (
        "函数 变量 循环 数组 指针 接口 线程 编译器 递归 哈希 队列 字符串 异常 内存",
        ["写一个{}来遍历{}。", "为什么{}里的{}是空的？", "用{}实现一个{}，并写出注释。"],
    ),
}


def rows(topic: str, num: int, seed: int) -> list[str]:
    """`num` short rows of one topic, of one to three sentences."""
    words, sentences = TOPICS[topic]
    generator = random.Random(f"{topic} {seed}")
    made = []
    for _ in range(num):
        chosen = [generator.choice(sentences) for _ in range(generator.randint(1, 3))]
        made.append(" ".join(sentence.format(*generator.sample(words.split(), 2)) for sentence in chosen))
    return made


def mixture(sizes: dict[str, int], seed: int) -> tuple[list[str], list[int]]:
    """Texts of several topics in random order, and for each the index of its topic."""
    pairs = [(text, index) for index, (topic, num) in enumerate(sizes.items()) for text in rows(topic, num, seed)]
    random.Random(seed).shuffle(pairs)
    return [text for text, _ in pairs], [index for _, index in pairs]
