"""MaTU on image folders of your own, on a laptop, without a download.

    python -m matu_jax.prepare --config experiments/own_folders.py --config.data.folders=my-images
    python -m matu_jax.train --config experiments/own_folders.py --config.data.folders=my-images

Every folder in my-images is a task, laid out as my-images/<task>/train/<class>/<image> and
my-images/<task>/test/<class>/<image>. Eight clients hold one task each and share its training
images out among them; what is trained are adapters of the small backbone that comes with the
package, which sees images of 32 pixels, and a linear head per task. With more than eight folders
raise data.clients; data.tasks_per_client=2 gives every client two tasks.

For a larger model give a checkpoint of any size, such as --config.model.architecture=clip
--config.model.checkpoint=openai/clip-vit-base-patch32, to both commands; images are then as large
as it takes them.

Expected, on the folders that experiments/make_example_folders.py makes, and how long it takes:
results/own_folders.md, with what chance, untrained models and logistic regression reach.
"""

from matu_jax.config import default


def get_config():
    config = default()
    config.algorithm = "matu"
    config.rounds = 6
    config.data.tasks = "folders"  # all of config.data.folders
    config.data.clients = 8
    config.data.tasks_per_client = 1
    config.data.examples_per_slot = 0  # all there are
    config.model.head = "trained"
    config.local.steps = 20
    config.local.batch_examples = 16
    config.local.learning_rate = 3e-3
    config.evaluation.every_rounds = 2
    config.evaluation.max_examples = 1000
    return config
