"""The papers behind the methods of recovery, as BibTeX; those of the algorithms stand on their classes (`citation`)."""

from __future__ import annotations

from ...algorithm import Citation

PAPERS = {
    "reconstruct": Citation(
        "guo2024ebft",
        "{EBFT}: Effective and Block-Wise Fine-Tuning for Sparse {LLMs}",
        "Song Guo and Fan Wu and Lei Zhang and Xiawu Zheng and Shengchuan Zhang and Fei Chao and Yiyu Shi and Rongrong Ji",
        2024,
        "2402.12419",
    ),
    "half-blocks": Citation(
        "wagner2025free",
        "A Free Lunch in {LLM} Compression: Revisiting Retraining after Pruning",
        "Moritz Wagner and Christophe Roux and Max Zimmer and Sebastian Pokutta",
        2025,
        "2510.14444",
    ),
    "lora": Citation(
        "hu2021lora",
        "{LoRA}: Low-Rank Adaptation of Large Language Models",
        "Edward J. Hu and Yelong Shen and Phillip Wallis and Zeyuan Allen-Zhu and Yuanzhi Li and Shean Wang and "
        "Lu Wang and Weizhu Chen",
        2021,
        "2106.09685",
    ),
}
RECOVERY = {"reconstruct": ("reconstruct", "half-blocks"), "lora": ("lora",)}  # method -> papers
