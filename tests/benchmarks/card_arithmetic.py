"""What a training pass should take on a card, by counting what it computes and what it moves.

Pure functions of a model's shapes and a card's rates, for `bench_gpu.py --card`. A pass takes
`questions` prompts forward and backward through the decoder layers, of which the last `kept` keep
what their backward pass needs; the others are computed once more. What is counted, for each layer:

- products: 2 FLOP for each weight and token, forward, and as many for the gradient of its input
  (the weights are frozen); the pass of a layer that recomputes has them three times.
- dequantisation: NF4 weights are read (0.5 bytes) and written in 16 bits (2 bytes) for every
  product, whatever the number of questions.
- attention: its two products over all pairs of a token and an earlier one, 2.5 times as many in the
  backward pass; where flash attention is missing, the scores also go through memory.
- adapters: three products for each of A and B with the backward pass, and the dropped copies of
  their inputs (q, k and v share one, gate and up another), which are written and read, as their
  outputs are.
- elementwise: norms, rotary positions, residuals, the gate's activation and their gradients.
- copies: the image's cached features, from the host.
- launches: the host needs time for each kernel. It works ahead of the card, so that a pass takes
  the longer one of both times, unless it is replayed as a CUDA graph.
"""

from dataclasses import asdict, dataclass

NUMBER = 2  # bytes, in 16 bits
PACKED = 0.5 + 1 / 64  # bytes of a weight in NF4 with its scale
LAUNCHES = 52  # kernels of a decoder layer's forward pass: 2.5 times as many were counted of both
SCORE_PASSES = 4  # times that unfused attention reads or writes its scores, forward


@dataclass(frozen=True)
class Card:
    """What a card does in a second."""

    name: str
    products: float  # FLOP of 16-bit matrix products, as reached
    memory: float  # bytes read or written, as reached
    host_copy: float  # bytes copied from the host
    launch: float  # seconds that the host takes for a kernel
    has_flash: bool  # attention's scores never leave the chip


# 65 TFLOP/s in fp16 and 320 GB/s by its data sheet. In use 20 to 25 TFLOP/s are reported; of the
# memory's rate 80 % are usual. 6 GB/s: pageable memory over PCIe 3. Python needs about 15
# microseconds for a kernel on a Kaggle machine.
T4 = Card("T4", products=22e12, memory=256e9, host_copy=6e9, launch=15e-6, has_flash=False)


@dataclass(frozen=True)
class LayerShapes:
    """A language model of equal decoder layers."""

    layers: int
    hidden: int
    queries: int  # width of all query heads
    keys: int  # width of all key heads; values have as many
    inner: int  # of the gated MLP
    heads: int
    rank: int  # of the adapters; 0: none
    feature_layers: int  # that take image features: the first, and those of deepstack
    is_packed: bool  # weights are in NF4

    @property
    def weights(self) -> int:
        """Parameters of a layer's linear layers."""
        attention = self.hidden * (2 * self.queries + 2 * self.keys)
        return attention + 3 * self.hidden * self.inner

    @property
    def lora_inputs(self) -> int:
        """Width of the different inputs of a layer's LoRA layers, together."""
        return 2 * self.hidden + self.queries + self.inner

    @property
    def lora_outputs(self) -> int:
        """Width of their outputs, together."""
        return self.queries + 2 * self.keys + 2 * self.hidden + 2 * self.inner


def shapes_of(config, rank: int, is_packed: bool) -> LayerShapes:
    """From the model's configuration."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    deepstack = getattr(config.vision_config, "deepstack_visual_indexes", ())
    return LayerShapes(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        queries=head_dim * text.num_attention_heads,
        keys=head_dim * text.num_key_value_heads,
        inner=text.intermediate_size,
        heads=text.num_attention_heads,
        rank=rank,
        feature_layers=1 + len(deepstack),
        is_packed=is_packed,
    )


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of a forward and backward pass by what they go to."""

    products: float
    dequantisation: float
    attention: float
    adapters: float
    elementwise: float
    copies: float
    launches: float  # of the host, beside all others

    @property
    def total(self) -> float:
        """The card's seconds, or the host's where it is slower."""
        on_card = sum(asdict(self).values()) - self.launches
        return max(on_card, self.launches)


def pass_seconds(
    card: Card, shapes: LayerShapes, tokens: int, image_tokens: int, questions: int, kept: int
) -> PassSeconds:
    """What a pass over `questions` prompts takes, of `tokens` each, `image_tokens` among them.

    With `kept` of the layers keeping their activations. See the module's docstring.

    >>> shapes = LayerShapes(36, 4096, 4096, 1024, 12288, 32, 16, 4, True)
    >>> round(pass_seconds(T4, shapes, 366, 256, questions=4, kept=36).products, 2)
    1.85
    >>> round(pass_seconds(T4, shapes, 366, 256, questions=4, kept=0).products, 2)
    2.77
    """
    forwards = 2 * shapes.layers - kept  # each layer's, and those of layers that recompute
    backwards = shapes.layers
    rows = questions * tokens
    both = forwards + backwards

    products = both * 2 * shapes.weights * rows / card.products
    unpacked = both * shapes.weights * (PACKED + NUMBER) / card.memory

    score_flops = 4 * rows * tokens / 2 * shapes.queries
    attention = (forwards + 2.5 * backwards) * score_flops / card.products
    if not card.has_flash:
        score_bytes = NUMBER * questions * shapes.heads * tokens**2 / 2
        attention += (forwards + 2 * backwards) * SCORE_PASSES * score_bytes / card.memory

    lora_width = shapes.lora_inputs + shapes.lora_outputs
    lora_flops = 2 * rows * shapes.rank * lora_width
    # A copy is written and read again; to an output something is added: read, and written.
    lora_bytes = NUMBER * rows * (3 * shapes.lora_inputs + 2 * shapes.lora_outputs)
    adapters = (forwards + 2 * backwards) * lora_flops / card.products
    if shapes.rank:
        adapters += both * lora_bytes / card.memory

    norms_and_residuals = (2 * 2 + 2 * 3) * shapes.hidden  # each reads and writes
    heads = 4 * shapes.queries + 2 * shapes.keys  # rotary positions; keys and values repeated
    elementwise_bytes = NUMBER * rows * (norms_and_residuals + heads + 3 * shapes.inner)
    elementwise = (forwards + 2 * backwards) * elementwise_bytes / card.memory

    features = NUMBER * questions * image_tokens * shapes.hidden * shapes.feature_layers
    launches = (forwards + 1.5 * backwards) * LAUNCHES
    return PassSeconds(
        products=products,
        dequantisation=unpacked if shapes.is_packed else 0.0,
        attention=attention,
        adapters=adapters,
        elementwise=elementwise,
        copies=features / card.host_copy,
        launches=launches * card.launch,
    )
