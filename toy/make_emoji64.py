"""Make emoji64.tar, 3,781 real images with classes and captions, from a public package.

    npm pack emoji-datasource-google@16.0.0        # or download that file from any npm mirror: 74 MB
    python -m toy.make_emoji64 emoji-datasource-google-16.0.0.tgz emoji64.tar

The images are Noto Emoji (Apache License 2.0), 64 x 64 pixels, put on white. The class is the category of the emoji,
the caption its Unicode name in lower case and the skin tones. Equal packages make equal shards, byte for byte.
"""

import argparse
import io
import json
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from asymflow.packages import importing

with importing(__name__):
    from PIL import Image
    from tqdm import tqdm

    from asymflow import files, opening
    from asymflow.cli.common import new_file
    from asymflow.errors import InputError

TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


def captions(emoji: list[dict]) -> Iterator[tuple[str, str, str]]:
    """(file name of the image, category, caption) of every emoji, skin tones included."""
    for e in sorted(emoji, key=lambda e: e["unified"]):
        if e["category"] != "Component" and e["has_img_google"]:
            yield e["image"], e["category"], e["name"].lower()
            for tones, variation in sorted(e.get("skin_variations", {}).items()):
                if variation["has_img_google"]:
                    words = [e["name"].lower(), *(f"{TONES[tone]} skin tone" for tone in tones.split("-"))]
                    yield variation["image"], e["category"], ", ".join(words)


def on_white(png: bytes) -> bytes:
    """An image as RGB on white, as PNG."""
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    out = io.BytesIO()
    Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB").save(out, "png")
    return out.getvalue()


def make(package: Path, out: Path) -> int:
    """Write the shard, in the order of the code points, and return the number of images."""
    new_file(out)
    with tarfile.open(opening.existing_file(package)) as inside, files.replacing(out, new=True) as beside:
        read = lambda name: inside.extractfile(f"package/{name}").read()
        rows = list(captions(json.loads(read("emoji.json"))))
        categories = sorted({category for _, category, _ in rows})
        # The package is compressed as a whole: its files are read in the order in which they lie.
        wanted = {f"package/img/google/64/{image}" for image, _, _ in rows}
        images = {}
        for member in tqdm(inside, desc="reading", unit="file", leave=False):
            if member.name in wanted:
                images[Path(member.name).name] = on_white(inside.extractfile(member).read())
        with tarfile.open(beside, "w", format=tarfile.USTAR_FORMAT) as shard:
            for image, category, caption in rows:
                key = image.removesuffix(".png")
                contents = {"png": images[image], "txt": caption.encode(), "cls": b"%d" % categories.index(category)}
                for kind, content in contents.items():
                    info = tarfile.TarInfo(f"{key}.{kind}")
                    info.size = len(content)
                    shard.addfile(info, io.BytesIO(content))
    return len(rows)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("toy.make_emoji64", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("package", type=Path, help="emoji-datasource-google-16.0.0.tgz")
    p.add_argument("out", type=Path, help="emoji64.tar")
    args = p.parse_args(argv)
    try:
        print(f"wrote {args.out} with {make(args.package, args.out)} images")
    except (InputError, OSError) as e:
        print(f"toy.make_emoji64: error: {e}", file=sys.stderr)
        return 2
    except (tarfile.TarError, EOFError, zlib.error, KeyError, ValueError) as e:
        why = [*str(e).splitlines(), type(e).__name__][0]
        reason = f"{args.package} is not the package emoji-datasource-google, or not all of it ({why})"
        print(f"toy.make_emoji64: error: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
