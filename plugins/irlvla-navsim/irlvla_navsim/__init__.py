"""NAVSIM and OpenScene data with nuPlan maps as irlvla scenes; official result and submission files. No devkit is needed."""

import irlvla


@irlvla.hookimpl
def irlvla_datasets() -> dict[str, str]:
    return {
        "navsim": "irlvla_navsim.dataset:NavsimDataset",
        "navsim_synthetic": "irlvla_navsim.dataset:SyntheticStageDataset",
        "navsim_cache": "irlvla_navsim.dataset:MetricCacheDataset",
    }
