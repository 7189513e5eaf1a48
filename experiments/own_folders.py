"""MaTU on image folders of your own, on a laptop, without a download.

    python -m matu_jax.prepare --config experiments/own_folders.py --config.data.folders=my-images
    python -m matu_jax.train --config experiments/own_folders.py --config.data.folders=my-images

Every folder in my-images is a task, laid out as my-images/<task>/train/<class>/<image> and
my-images/<task>/test/<class>/<image>. Eight clients hold one task each and share its training
images out among them; what is trained are adapters of the small backbone that comes with the
package, which sees images of 32 pixels, and a linear head per task. With more than eight folders
raise data.clients; data.tasks_per_client=2 gives every client two tasks.

Where images belong to sites, as my-sites/<site>/<task>/train/<class>/<image> and so on, give
--config.data.sites=my-sites in place of folders, and data.clients as many as there are sites.

For a larger model give a checkpoint of any size, such as --config.model.architecture=clip
--config.model.checkpoint=openai/clip-vit-base-patch32, to both commands; images are then as large
as it takes them.

Expected, on the folders that experiments/make_example_folders.py makes, and how long it takes:
results/own_folders.md, with what chance, untrained models and logistic regression reach.
"""

from matu_jax.config import Config, DataConfig, EvaluationConfig, LocalConfig, ModelConfig


def get_config():
    return Config(
        algorithm="matu",
        rounds=6,
        data=DataConfig(
            tasks="folders",  # all of config.data.folders
            clients=8,
            tasks_per_client=1,
            examples_per_slot=0,  # all there are
        ),
        model=ModelConfig(head="trained"),
        local=LocalConfig(steps=20, batch_examples=16, learning_rate=3e-3),
        evaluation=EvaluationConfig(every_rounds=2, max_examples=1000),
    )
