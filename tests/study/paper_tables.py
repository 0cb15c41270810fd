"""Figures that arXiv 2408.14470v2 prints, for tests of statistics that it prints beside them."""

from __future__ import annotations

TABLE_3 = {  # section 5.1: RoBERTa with Pfeiffer adapters, four tasks; Wilcoxon 9.0, p 0.12
    "sparse-adapter": [90.88, 58.95, 89.41, 77.03],
    "id3": [90.71, 59.84, 89.95, 79.42],
}

TABLE_5 = {  # T5-small on CNN/DailyMail at 100K, 320K, 1M; Wilcoxon 6.0, p 0.13 in each column
    "pafi": {"rouge1": [40.15, 40.75, 41.16], "rouge2": [18.03, 18.57, 18.79], "rougeL": [28.49, 28.83, 29.09]},
    "id3": {"rouge1": [40.43, 40.91, 41.17], "rouge2": [18.44, 18.73, 18.85], "rougeL": [28.76, 28.98, 29.17]},
}

COLUMNS = ("addsub", "multiarith", "singleeq", "gsm8k", "aqua", "svamp", "avg")
_TABLE_6 = {  # LLaMA-7B, Qwen-7B, Qwen-3B, Qwen-1.5B; Wilcoxon 4, 4, 4, 4, 6, 6, 10
    "lora:r=32": (
        (81.3, 95.5, 81.7, 34.1, 17.7, 46.7, 59.5),
        (94.4, 98.2, 97.6, 76.9, 34.6, 85.8, 81.3),
        (92.1, 98.5, 95.9, 71.9, 34.2, 81.5, 79.0),
        (90.4, 98.2, 96.6, 65.8, 36.6, 75.3, 77.2),
    ),
    "lora:r=2": (
        (78.2, 96.7, 76.6, 35.3, 16.9, 44.9, 58.1),
        (93.9, 98.3, 96.4, 76.4, 31.9, 86.8, 80.6),
        (92.9, 97.5, 94.9, 70.8, 34.6, 85.1, 79.3),
        (91.9, 98.2, 95.5, 62.8, 31.1, 80.9, 76.7),
    ),
    "pafi": (
        (78.7, 92.3, 76.8, 33.9, 16.9, 43.2, 57.0),
        (91.1, 99.0, 97.0, 78.5, 37.8, 85.8, 81.5),
        (90.9, 97.8, 96.2, 70.6, 36.2, 83.9, 79.3),
        (89.4, 96.7, 95.9, 64.5, 32.3, 78.4, 76.2),
    ),
    "id3": (
        (80.7, 95.8, 79.3, 34.3, 15.7, 45.7, 58.6),
        (93.6, 98.5, 95.1, 77.9, 37.0, 87.1, 81.5),
        (92.6, 98.2, 95.9, 71.5, 37.4, 83.9, 79.9),
        (91.6, 97.8, 93.7, 62.6, 34.6, 81.0, 76.9),
    ),
}
TABLE_6 = {
    method: {column: [row[at] for row in rows] for at, column in enumerate(COLUMNS)}
    for method, rows in _TABLE_6.items()
}

_TABLE_7 = {  # MobileLLaMA-2.7B; Wilcoxon 88.0 is printed, which counts the average as two more pairs
    ("pafi", "2.7M"): (46.1, 66.5, 46.6, 11.1, 18.7, 23.1, 35.4),
    ("id3", "2.7M"): (47.1, 67.8, 48.4, 11.9, 17.3, 25.0, 36.3),
    ("pafi", "1.3M"): (30.1, 36.2, 30.7, 8.1, 21.2, 17.5, 24.0),
    ("id3", "1.3M"): (35.2, 57.8, 41.1, 8.6, 15.7, 22.0, 30.1),
}
TABLE_7 = {
    method: {
        (column, budget): [row[at]]
        for (of, budget), row in _TABLE_7.items()
        for at, column in enumerate(COLUMNS)
        if of == method
    }
    for method in ("pafi", "id3")
}

FULL_ON_GLUE = (90.21, 90.32, 91.98, 94.1, 96.16, 90.89, 70.65, 89.71, 83.21)  # table 1, in the order of its columns
