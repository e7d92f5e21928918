"""Graphics cards as the module knows them, and what the preset `auto` picks for each."""

T4 = {"index": 0, "name": "Tesla T4", "memory_gib": 15.0, "capability": 7.5}
A100 = {"index": 0, "name": "A100-SXM4-40GB", "memory_gib": 39.5, "capability": 8.0}
P100 = {"index": 0, "name": "Tesla P100", "memory_gib": 16.0, "capability": 6.0}
# Name, MiB and capability as nvidia-smi reports them; the preset that "auto" picks; a word of
# its reason.
CARDS = {
    "T4 x2": (
        [("Tesla T4", 15360, 7.5)] * 2,
        "kaggle_t4x2",
        "smallest of 2 GPUs: Qwen3-VL-8B fits in 4-bit",
    ),
    "T4": ([("Tesla T4", 15360, 7.5)], "colab_t4", "Tesla T4, 15.0 GiB: Qwen3-VL-8B fits in 4-bit"),
    "V100 16 GB": ([("Tesla V100-SXM2-16GB", 16160, 7.0)], "colab_t4", "fits in 4-bit"),
    "V100 32 GB": ([("Tesla V100-SXM2-32GB", 32510, 7.0)], "gpu_24gb", "1024 tokens"),
    "L4": ([("NVIDIA L4", 23034, 8.9)], "gpu_24gb", "1024 tokens"),
    "L4 x4": ([("NVIDIA L4", 23034, 8.9)] * 4, "gpu_24gb", "smallest of 4 GPUs"),
    "A10": ([("NVIDIA A10G", 23028, 8.6)], "gpu_24gb", "1024 tokens"),
    "A100 40 GB": ([("NVIDIA A100-SXM4-40GB", 40960, 8.0)], "colab_a100", "16 bits"),
    "A100 80 GB": ([("NVIDIA A100-SXM4-80GB", 81920, 8.0)], "colab_a100", "16 bits"),
    "A100 80 GB, PCIe": ([("NVIDIA A100 80GB PCIe", 81559, 8.0)], "colab_a100", "16 bits"),
    "H100": ([("NVIDIA H100 80GB HBM3", 81559, 9.0)], "colab_a100", "16 bits"),
    "H200": ([("NVIDIA H200", 143771, 9.0)], "colab_a100", "16 bits"),
    "RTX 12 GB": ([("NVIDIA GeForce RTX 3060", 12288, 8.6)], "colab_t4", "fits in 4-bit"),
    "RTX 8 GB": ([("NVIDIA GeForce RTX 3070", 8192, 8.6)], "single", "only Qwen3-VL-4B"),
    "unknown": ([("Some Future Card", 49140, 12.0)], "colab_a100", "Some Future Card, 48.0 GiB"),
    "mixed": (
        [("NVIDIA A100-SXM4-80GB", 81920, 8.0), ("Tesla T4", 15360, 7.5)],
        "kaggle_t4x2",
        "Tesla T4, 15.0 GiB",
    ),
}
