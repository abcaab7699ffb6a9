"""The papers behind each algorithm, as BibTeX. Years are those of the first arXiv version."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """Enough of a paper for a BibTeX entry: `key`, `title`, `authors`, `year`, and the arXiv number."""

    key: str
    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def url(self) -> str:
        """The abstract's page."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    def bibtex(self) -> str:
        """The entry."""
        return (
            f"@misc{{{self.key},\n  title = {{{self.title}}},\n  author = {{{self.authors}}},\n  year = {{{self.year}}},\n"
            f"  eprint = {{{self.arxiv}}},\n  archivePrefix = {{arXiv}},\n  url = {{{self.url}}}\n}}"
        )


# By the name of an allocator, row allocator or pruner, or of what `RECOVERY` names.
PAPERS = {
    "magnitude": Paper(
        "han2015learning",
        "Learning both Weights and Connections for Efficient Neural Networks",
        "Song Han and Jeff Pool and John Tran and William J. Dally",
        2015,
        "1506.02626",
    ),
    "wanda": Paper(
        "sun2023simple",
        "A Simple and Effective Pruning Approach for Large Language Models",
        "Mingjie Sun and Zhuang Liu and Anna Bair and J. Zico Kolter",
        2023,
        "2306.11695",
    ),
    "sparsegpt": Paper(
        "frantar2023sparsegpt",
        "{SparseGPT}: Massive Language Models Can Be Accurately Pruned in One-Shot",
        "Elias Frantar and Dan Alistarh",
        2023,
        "2301.00774",
    ),
    "owl": Paper(
        "yin2023outlier",
        "Outlier Weighed Layerwise Sparsity ({OWL}): A Missing Secret Sauce for Pruning {LLMs} to High Sparsity",
        "Lu Yin and You Wu and Zhenyu Zhang and Cheng-Yu Hsieh and Yaqing Wang and Yiling Jia and Gen Li and "
        "Ajay Jaiswal and Mykola Pechenizkiy and Yi Liang and Michael Bendersky and Zhangyang Wang and Shiwei Liu",
        2023,
        "2310.05175",
    ),
    "alphapruning": Paper(
        "lu2024alphapruning",
        "{AlphaPruning}: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large "
        "Language Models",
        "Haiquan Lu and Yefan Zhou and Shiwei Liu and Zhangyang Wang and Michael W. Mahoney and Yaoqing Yang",
        2024,
        "2410.10912",
    ),
    "farms": Paper(
        "hu2025eigenspectrum",
        "Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias",
        "Yuanzhe Hu and Kinshuk Goel and Vlad Killiakov and Yaoqing Yang",
        2025,
        "2506.06280",
    ),
    "mrp": Paper(
        "gao2025maximum",
        "Maximum Redundancy Pruning: A Principle-Driven Layerwise Sparsity Allocation for {LLMs}",
        "Chang Gao and Kang Zhao and Jianfei Chen and Liping Jing",
        2025,
        "2503.18377",
    ),
    "msp": Paper(
        "xu2025towards",
        "Towards Extreme Pruning of {LLMs} with Plug-and-Play Mixed Sparsity",
        "Chi Xu and Gefei Zhang and Yantong Zhu and Luca Benini and Guosheng Hu and Yawei Li and Zhihong Zhang",
        2025,
        "2503.11164",
    ),
    "trim": Paper(
        "beck2025trim",
        "{TRIM}: Achieving Extreme Sparsity with Targeted Row-wise Iterative Metric-driven Pruning",
        "Florentin Beck and William Rudman and Carsten Eickhoff",
        2025,
        "2505.16743",
    ),
    "dlp": Paper(
        "chen2025dlp",
        "{DLP}: Dynamic Layerwise Pruning in Large Language Models",
        "Yuli Chen and Bo Cheng and Jiale Han and Yingying Zhang and Yingting Li and Shuhao Zhang",
        2025,
        "2505.23807",
    ),
    "atp": Paper(
        "huang2025determining",
        "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective",
        "Weizhong Huang and Yuxin Zhang and Xiawu Zheng and Fei Chao and Rongrong Ji",
        2025,
        "2502.14770",
    ),
    "qkvo": Paper(
        "sieberling2024evopress",
        "{EvoPress}: Towards Optimal Dynamic Model Compression via Evolutionary Search",
        "Oliver Sieberling and Denis Kuznedelev and Eldar Kurtic and Dan Alistarh",
        2024,
        "2410.14649",
    ),
    "reconstruct": Paper(
        "guo2024ebft",
        "{EBFT}: Effective and Block-Wise Fine-Tuning for Sparse {LLMs}",
        "Song Guo and Fan Wu and Lei Zhang and Xiawu Zheng and Shengchuan Zhang and Fei Chao and Yiyu Shi and Rongrong Ji",
        2024,
        "2402.12419",
    ),
    "half-blocks": Paper(
        "wagner2025free",
        "A Free Lunch in {LLM} Compression: Revisiting Retraining after Pruning",
        "Moritz Wagner and Christophe Roux and Max Zimmer and Sebastian Pokutta",
        2025,
        "2510.14444",
    ),
    "lora": Paper(
        "hu2021lora",
        "{LoRA}: Low-Rank Adaptation of Large Language Models",
        "Edward J. Hu and Yelong Shen and Phillip Wallis and Zeyuan Allen-Zhu and Yuanzhi Li and Shean Wang and "
        "Lu Wang and Weizhu Chen",
        2021,
        "2106.09685",
    ),
}
PAPERS["fisher"] = PAPERS["msp"]  # that paper's sensitivities without its search

RECOVERY = {"reconstruct": ("reconstruct", "half-blocks"), "lora": ("lora",)}  # method -> papers
