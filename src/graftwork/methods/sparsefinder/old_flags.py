"""Flags of the authors' commands without an equal here, with their new form; the command line answers with it."""

from __future__ import annotations

from collections.abc import Mapping

_ONE_FOLDER = "the run folder: graftwork convert sparsefinder MODEL -o RUN, then graftwork train RUN"
_IMPORT = "graftwork import sparsefinder RUN --projections FILE --centroids FILE"

OLD_FLAGS: Mapping[str, str] = {
    "--attn-variant": "--grouping of graftwork convert sparsefinder: kmeans, distance, quantize, bigbird, longformer, "
    "openai_sparse, reformer or routing",
    "--activation": "--alpha: 1.5 for entmax, 1 for softmax",
    "--wikipath": "--task wikitext/103_raw --data DIR",
    "--outdir": _ONE_FOLDER,
    "--pretrained-path": "graftwork evaluate RUN",
    "--model-path": _ONE_FOLDER,
    "--projections-path": _IMPORT,
    "--centroids-path": _IMPORT,
    "--cls-size": "--add-cls-mask for 1, with --add-last-mask for 2",
    "--num-random-blocks": "--block-budget with --grouping mean_pooled, pages or gate",
    "--finetune-part": "no option: graftwork train RUN trains with the graph active",
    "--timeit": "graftwork graphs RUN --cost-lengths 512,1024",
    "--nsamples": "--samples of graftwork convert sparsefinder",
    "--dist": "--grouping distance --distance NAME",
    "--dist-t": "--threshold, or --target-sparsity",
    "--dist-p": "--distance-p",
    "--skip-proj": "--skip-projectors",
    "--add-causal-mask": "no option: the model determines it",
    "--num-layers": "no option: the model determines it",
    "--temp": "--temperature",
    "--eval-steps": "--logging-steps, and graftwork graphs RUN for recall",
    "--accum": "--projection-batch-size",
    "--accumulation-steps": "--projection-batch-size",
    "--grouping-strategy": "--grouping and --distance",
    "--plot-dist-x-buckets": "graftwork graphs RUN",
}
"""New form by old flag, with hyphens."""
