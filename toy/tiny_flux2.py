"""A tiny FLUX.2 klein: the classes, the files and the folders of the real one, a few hundred thousand weights.

    pipeline = make_base(captions)           # a diffusers.Flux2KleinPipeline with random weights
    pipeline.save_pretrained("runs/base")    # the folder that `asymflow data encode --base` and the others take

Nothing is downloaded: the tokenizer is trained on the captions.
"""

from collections.abc import Iterable

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

TEXT_LENGTH = 32  # tokens of a prompt; the real models have 512
TEXT_LAYERS = 28  # the pipelines of FLUX.2 klein take the hidden states after layers 9, 18 and 27
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_base(
    captions: Iterable[str],
    seed: int = 0,
    latent_channels: int = 4,
    width: int = 64,
    heads: int = 2,
    depth: tuple[int, int] = (1, 2),
    text_width: int = 32,
    vae_channels: tuple[int, ...] = (8, 16, 16, 16),
) -> Flux2KleinPipeline:
    """A pipeline with random weights, the same for the same arguments.

    captions: the tokenizer is trained on them. latent_channels: of the autoencoder; latent tokens have the dimension
    r = 4 latent_channels. width, heads: of the transformer. depth: its double and single blocks. text_width: of the
    text encoder; text embeddings are 3 times as wide. vae_channels: of each resolution of the autoencoder; with four of
    them, as in the real one, a latent token covers 16 x 16 pixels, with three 8 x 8.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(captions)
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=text_width,
                intermediate_size=2 * text_width,
                num_hidden_layers=TEXT_LAYERS,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=text_width // 2,
                max_position_embeddings=512,
                initializer_range=0.2,  # untrained as it is, it should tell captions apart
                tie_word_embeddings=True,
            )
        )
        vae = AutoencoderKLFlux2(
            block_out_channels=vae_channels,
            latent_channels=latent_channels,
            norm_num_groups=8,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
            sample_size=64,
        )
        head = width // heads
        transformer = Flux2Transformer2DModel(
            in_channels=4 * latent_channels,
            num_layers=depth[0],
            num_single_layers=depth[1],
            attention_head_dim=head,
            num_attention_heads=heads,
            joint_attention_dim=3 * text_width,
            axes_dims_rope=(head // 4,) * 4,
            guidance_embeds=False,
        )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, vae.eval(), text_encoder.eval(), tokenizer, transformer.eval())


@torch.no_grad()
def normalize_latents(vae: AutoencoderKLFlux2, images: torch.Tensor) -> None:
    """Set the statistics by which FLUX.2 normalizes latents to those of images (n, 3, H, W) in [-1, 1]."""
    modes = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(64)])
    tokens = torch.nn.functional.pixel_unshuffle(modes, 2)
    vae.bn.running_mean.copy_(tokens.mean((0, 2, 3)))
    vae.bn.running_var.copy_(tokens.var((0, 2, 3)))


def make_tokenizer(captions: Iterable[str], size: int = 400) -> Qwen2TokenizerFast:
    """Of the class that FLUX.2 klein has, trained on the captions, with a chat template like that of Qwen."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = Qwen2TokenizerFast(tokenizer_object=bpe, eos_token=special[2], pad_token=special[0])
    tokenizer.chat_template = CHAT
    return tokenizer
