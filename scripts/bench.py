"""Speed and memory, side by side in one run, as ratios: PMP and CLIPSeg beside transformers', and what options cost.

    python scripts/bench.py                          # all sections; some 25 minutes on two cores
    python scripts/bench.py forward train            # some
    python scripts/bench.py clipseg                  # CLIPSeg's (see bench_clipseg.py)
    python scripts/bench.py --device cuda            # on a GPU: bf16, compile, batch sizes, memory
    python scripts/bench.py clipseg --device cuda

Weights are random: speed does not depend on them. Sides are run in turns (on a GPU one after the other, for their peaks) and
their medians compared, since machines are noisy. `forward` prints how far both sides' answers differ; tests check more sizes.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from bench_clipseg import clipseg, clipseg_gpu, clipseg_parity
from bench_common import in_turns, show
from torch.profiler import ProfilerActivity, profile

from pmpseg.usage import forget_peak, peak_gib

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mkldnn_convolution", "_slow_conv2d_forward", "thnn_conv2d", "cudnn_convolution")
STAGES = ["stage1", "stage2", "stage3", "stage4"]
SIZE, CLASSES = 512, 133


def swin_mask2former() -> torch.nn.Module:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(out_features=STAGES, drop_path_rate=0.0)
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES))


def pmp_like(reference: torch.nn.Module, **options: object) -> torch.nn.Module:
    """The converted network, or one of its size with other options."""
    from pmpseg.models import PMP

    converted = PMP.from_transformers(reference)
    if not options:
        return converted
    network = PMP(**(converted.config | options))
    own, theirs = network.state_dict(), converted.state_dict()
    fitting = {name: value for name, value in theirs.items() if name in own and own[name].shape == value.shape}
    network.load_state_dict(fitting, strict=False)
    return network


def share_of_products(run: Callable[[], object]) -> float:
    """Of the time of one run, the part in matrix products and convolutions: what no way of writing the rest could save."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    own = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in recorded.key_averages()}
    return sum(own.get(name, 0.0) for name in PRODUCTS) / sum(own.values())


@torch.inference_mode()
def parity(_: int) -> None:
    """Random weights of a Swin-T at full size, with noise where fresh weights are all alike.

    Masked attention has a threshold: rounding moves some logits across it, and answers jump. So transformers' float32 is also
    held against its own float64.
    """
    reference = swin_mask2former().eval()
    for name, p in reference.named_parameters():
        if "relative_position_bias_table" in name or "sampling_offsets" in name or "attention_weights" in name:
            p += torch.randn_like(p) * 0.3
    network = pmp_like(reference).eval()
    exact, exact_network = copy.deepcopy(reference).double(), copy.deepcopy(network).double()
    print("\nLargest difference of mask logits: PMP to transformers in float32, in float64; transformers' float32 to its float64")
    for size in ((224, 224), (256, 256), (224, 352), (230, 333)):
        image = torch.rand(1, 3, *size)
        normal = (image - network.backbone.mean) / network.backbone.std
        theirs, ours = reference(normal).masks_queries_logits, network(image, None).mask_logits
        normal = (image.double() - exact_network.backbone.mean) / exact_network.backbone.std
        theirs_exact, ours_exact = exact(normal).masks_queries_logits, exact_network(image.double(), None).mask_logits
        pairs = ((ours, theirs), (ours_exact, theirs_exact), (theirs, theirs_exact))
        print(f"  {size[0]}x{size[1]}: " + "   ".join(f"{(a - b).abs().max():.1e}" for a, b in pairs), flush=True)


@torch.inference_mode()
def forward(repeat: int) -> None:
    reference = swin_mask2former().eval()
    deformable, fpn = pmp_like(reference).eval(), pmp_like(reference, pixel_decoder="fpn").eval()
    image = torch.rand(1, 3, SIZE, SIZE)
    normal = (image - deformable.backbone.mean) / deformable.backbone.std
    want, got = reference(normal), deformable(image, None)
    print(f"largest difference of mask logits {(want.masks_queries_logits - got.mask_logits).abs().max():.1e}")
    sides = {"transformers Mask2Former": lambda: reference(normal), "PMP deformable": lambda: deformable(image, None)}
    sides["PMP fpn"] = lambda: fpn(image, None)
    show(f"Forward, Swin-T, {SIZE}x{SIZE}, 100 queries, float32, {torch.get_num_threads()} threads", in_turns(sides, repeat))
    for name, run in sides.items():
        print(f"  {name}: {share_of_products(run):.0%} of its time are matrix products and convolutions")
    features, maps = deformable.encode(image), deformable.backbone(image)
    pixels = reference.model.pixel_level_module
    theirs = pixels.encoder(normal).feature_maps
    parts = {
        "transformers backbone": lambda: pixels.encoder(normal),
        "PMP backbone": lambda: deformable.backbone(image),
        "transformers pixel decoder": lambda: pixels.decoder(theirs),
        "PMP pixel decoder": lambda: deformable.pixel_decoder(maps),
        "PMP query decoder": lambda: deformable.decode(features, None),
    }
    show("Its parts", in_turns(parts, repeat))


def train(repeat: int) -> None:
    from pmpseg.losses import SetLoss

    reference = swin_mask2former().train()
    network, loss = pmp_like(reference).train(), SetLoss()
    network.query_decoder.class_head.requires_grad_(True)
    image, masks = torch.rand(1, 3, SIZE, SIZE), torch.zeros(1, CLASSES, SIZE, SIZE, dtype=torch.bool)
    for k in range(10):
        masks[0, k, 50 * k : 50 * k + 60, 40 * k : 40 * k + 100] = True
    labels, present = [torch.arange(10)], masks.flatten(2).any(-1)
    normal = (image - network.backbone.mean) / network.backbone.std

    def theirs() -> None:
        reference.zero_grad()
        reference(normal, mask_labels=[masks[0, :10].float()], class_labels=labels).loss.backward()

    def ours() -> None:
        network.zero_grad()
        loss(network(image, None), masks, present)["loss"].backward()

    title = f"Training step (forward, own loss, backward), 1 image of {SIZE}x{SIZE}, 10 targets of {CLASSES} classes"
    show(title, in_turns({"transformers Mask2Former": theirs, "PMP deformable": ours}, repeat))


def sampling(repeat: int) -> None:
    """One layer of deformable attention at 512 px, without its products: forward, and forward with backward."""
    from pmpseg.models.deformable import places_in_pixels, sample_grids, sample_rows

    torch.manual_seed(0)
    sizes = [(16, 16), (32, 32), (64, 64)]
    places = places_in_pixels(sizes, torch.zeros(1))
    shape = (1, len(places), 8, 3, 4)
    x, y = (places[None, :, None, :, None, axis] + 2 * torch.randn(shape) for axis in (0, 1))
    given = [torch.randn(1, len(places), 8, 32), x, y, torch.rand(shape)]
    learnt = [t.clone().requires_grad_() for t in given]
    ways = {"grid_sample a level": sample_grids, "one bag of rows": sample_rows}
    with torch.inference_mode():
        show("Deformable sampling, forward", in_turns({name: partial(way, *given, sizes) for name, way in ways.items()}, repeat))
    both = {name: lambda way=way: way(*learnt, sizes).sum().backward() for name, way in ways.items()}
    show("Deformable sampling, forward and backward", in_turns(both, repeat))


@torch.inference_mode()
def prompts(repeat: int) -> None:
    from pmpseg.models import Prompts

    reference, count, few = swin_mask2former(), 171, 8
    image = torch.rand(1, 3, SIZE, SIZE)
    pooled, tokens = torch.randn(1, count, 512), torch.randn(1, count, 4, 512)
    asked = Prompts(tokens, torch.ones(1, count, 4, dtype=torch.bool), pooled, torch.ones(1, count, dtype=torch.bool))
    variants: dict[str, dict[str, object]] = {
        "blind": {"prompt_attention": "none"},
        "default: pooled, shared queries": {"prompt_gate": "none"},
        "zero gate": {},
        "word tokens (4 a prompt)": {"prompt_attention": "tokens"},
        "both directions": {"prompt_direction": "both"},
        "after the image attention": {"prompt_place": "after_image"},
    }
    pooled_options: dict[str, object] = {"prompt_attention": "pooled"}
    networks = {name: pmp_like(reference, **(pooled_options | options)).eval() for name, options in variants.items()}
    sides = {name: lambda n=network: n(image, asked) for name, network in networks.items()}
    seconds = in_turns(sides, repeat)
    show(f"Forward at {count} prompts", seconds)
    encoded = networks["blind"].encode(image)
    sides = {name: lambda n=network: n.decode(encoded, asked) for name, network in networks.items()}
    decoder = in_turns(sides, 5 * repeat)
    show(f"The decoder alone at {count} prompts", decoder)
    # All before the decoder is the same code, and its noise is larger than what guidance costs.
    cost = {name: (spent - decoder["blind"]) / seconds["blind"] for name, spent in decoder.items() if name != "blind"}
    print("  what guidance adds, of a whole forward: " + ", ".join(f"{name} {share:+.1%}" for name, share in cost.items()))
    repeated, shared = pmp_like(reference, prompt_queries="repeated").eval(), networks["zero gate"]
    some = asked.select(list(range(few)))
    sides = {"shared queries": lambda: shared.decode(encoded, some)}
    sides["repeated for each prompt"] = lambda: repeated.decode(encoded, some)
    show(f"The decoder alone at {few} prompts", in_turns(sides, max(1, repeat // 2)))


def memory(_: int) -> None:
    """Each case in a process of its own: its peak."""
    print("\nPeak resident memory of a forward and its class map, Swin-T, deformable, 100 queries, float32")
    for side, count in ((512, 1), (512, 171), (512, 847), (1024, 1), (1024, 847)):
        command = [sys.executable, __file__, "--peak", str(side), str(count)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        dense = count * side * side * 4 / 2**30
        print(f"  {side}x{side}, {count:4} classes: {ran.stdout.strip()}; (C, H, W) floats would be {dense:.2f} GiB", flush=True)


@torch.inference_mode()
def peak(side: int, count: int) -> None:
    from pmpseg.inference import semantic_labels
    from pmpseg.models import PMP

    network = PMP(backbone="swin_tiny_patch4_window7_224", pixel_decoder="deformable").eval()
    before = forget_peak()
    largest = Largest()
    with largest:
        prediction = network(torch.rand(1, 3, side, side), torch.randn(count, 512))
        semantic_labels(prediction, (side, side))
    print(f"{peak_gib():.2f} GiB ({before:.2f} with the network alone), largest tensor {largest.bytes / 2**30:.2f} GiB")


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@torch.inference_mode()
def region(_: int) -> None:
    from transformers import CLIPVisionConfig

    from pmpseg.models.region import RegionClassifier

    torch.manual_seed(0)
    config = CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, patch_size=16)
    shape = {"vision": config.to_dict() | {"projection_dim": 512}, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}
    image, masks = torch.rand(1, 3, SIZE, SIZE), torch.zeros(1, 100, SIZE, SIZE)
    for i in range(100):
        side = 40 + (i * 37) % 200
        y, x = (i * 53) % (SIZE - side), (i * 91) % (SIZE - side)
        masks[0, i, y : y + side, x : x + side] = 1.0
    names, sides = torch.randn(1, 171, 512), {}
    for name, options in (("crop, one by one", {"chunk": 1}), ("crop, 32 at once", {"chunk": 32}), ("pool", {"mode": "pool"})):
        torch.manual_seed(0)
        classifier = RegionClassifier(clip_config=shape, **options)
        sides[name] = lambda c=classifier: c(image, masks, names)
    one, many = (sides[name]()[0] for name in ("crop, one by one", "crop, 32 at once"))
    print(f"\nlargest difference of crop's logits, batched or not: {(one - many).abs().max():.1e}")
    show("Second stage: 100 proposals named among 171 by a ViT-B/16 at 224 px", in_turns(sides, 1))


@torch.inference_mode()
def gpu(repeat: int) -> None:
    """Images a second and peak memory beside transformers', float32 and bf16, compiled or not."""
    reference = swin_mask2former().eval().cuda()
    network = pmp_like(reference).eval().cuda()
    compiled = pmp_like(reference).eval().cuda()
    compiled.compile()
    for batch in (1, 4, 16):
        image = torch.rand(batch, 3, SIZE, SIZE, device="cuda")
        for dtype in (torch.float32, torch.bfloat16):
            print(f"\nbatch {batch}, {dtype}")
            sides = {"transformers": partial(reference, image), "PMP": partial(network, image, None)}
            for name, run in (sides | {"PMP compiled": partial(compiled, image, None)}).items():
                torch.cuda.reset_peak_memory_stats()
                with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                    seconds = in_turns({name: run}, repeat, "cuda")[name]
                memory = torch.cuda.max_memory_allocated() / 2**30
                print(f"  {name:16} {batch / seconds:8.1f} images a second, peak {memory:.2f} GiB", flush=True)


SECTIONS = {"parity": parity, "forward": forward, "train": train, "sampling": sampling}
SECTIONS |= {"prompts": prompts, "memory": memory, "region": region}
SECTIONS |= {"clipseg": clipseg, "clipseg_parity": clipseg_parity}
ON_A_GPU = {"forward": gpu, "clipseg": clipseg_gpu}


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)} (cuda: {', '.join(ON_A_GPU)}); default: all")
    parser.add_argument("--repeat", type=int, default=5, help="turns; default: 5")
    parser.add_argument("--threads", type=int, help="default: torch's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--peak", nargs=2, type=int, metavar=("SIDE", "CLASSES"), help=argparse.SUPPRESS)
    options = parser.parse_args(args)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak:
        peak(*options.peak)
        return
    sections = ON_A_GPU if options.device == "cuda" else SECTIONS
    if unknown := [name for name in options.sections if name not in sections]:
        raise SystemExit(f"no section {unknown[0]!r} on {options.device}: want some of {', '.join(sections)}")
    for name in options.sections or sections:
        sections[name](options.repeat)


if __name__ == "__main__":
    main()
