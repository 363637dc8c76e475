"""Which page stands in which section of the site, in this order. A page that stands in none is an error."""

from typing import NamedTuple


class Section(NamedTuple):
    """A tab of the site.

    Args:
        title: in the bar at the top.
        about: what a reader finds there, one sentence.
        pages: paths in the repository, without `docs/`. A section of one page has no page of its own.
    """

    title: str
    about: str
    pages: tuple[str, ...]


# The folder of a section is its key.
SECTIONS = {
    "start": Section(
        "Start",
        "A first loss and a first training, in the framework that you use.",
        (
            "install.md",
            "notebooks/ten_minutes_jax.ipynb",
            "notebooks/ten_minutes_torch.ipynb",
            "flax.md",
            "pytorch.md",
            "trainers.md",
            "migrating.md",
        ),
    ),
    "guide": Section(
        "Guide",
        "What the loss computes, every option, and the losses for large vocabularies and many devices.",
        (
            "concepts.md",
            "conventions.md",
            "does-it-help.md",
            "hanzi.md",
            "options.md",
            "metrics.md",
            "linear.md",
            "smoothing.md",
            "scaling.md",
        ),
    ),
    "parity": Section(
        "Parity",
        "Are two losses, models or trainings the same? How this is decided, and how you ask it of your own.",
        (
            "parity.md",
            "notebooks/same_loss.ipynb",
            "your-data.md",
            "models.md",
            "numerics.md",
            "peer-tests.md",
        ),
    ),
    "devices": Section(
        "Speed and devices",
        "Time, memory and accuracy on CPUs, GPUs and TPUs: measured, compiled or simulated, and which of these.",
        (
            "performance.md",
            "benchmarks.md",
            "devices.md",
            "notebooks/your_device.ipynb",
            "gpu.md",
            "tpu.md",
            "cost.md",
        ),
    ),
    "gallery": Section("Gallery", "The examples, with their pictures and their source.", ("examples.md",)),
    "api": Section(
        "API", "Every public name: arguments, results, errors and an example that runs.", ("api/index.rst",)
    ),
    "project": Section(
        "Project",
        "What has changed, how to contribute, and how to report a security problem.",
        ("CHANGELOG.md", "CONTRIBUTING.md", "house.md", "SECURITY.md", "versions.md"),
    ),
}

# Other people's notebooks find their place by themselves: at the end of this section.
OTHER_NOTEBOOKS = "start"
# Pages that no section lists, since the site starts with it, or since the build makes them.
HOME = "README.md"
MADE = ("api/index.rst", "house.md", "versions.md")
