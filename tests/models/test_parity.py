"""Our towers against torch, transformers and PEFT, on the same small checkpoints.

Relative errors are the largest absolute difference over the largest absolute value; `pytest -s`
shows them.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny_clip  # noqa: E402

from matu_jax import models  # noqa: E402
from matu_jax.config import ModelConfig  # noqa: E402
from matu_jax.models import pretrained, tensor_names  # noqa: E402
from matu_jax.models.backbone import parameter_shapes  # noqa: E402
from matu_jax.models.checkpoint_config import checked_architecture  # noqa: E402
from matu_jax.models.towers import VisionTower  # noqa: E402
from matu_jax.trees import leaf_items  # noqa: E402

TASK, IMAGES = tiny_clip.task(), tiny_clip.images()
LABELS = np.array([0, 1, 2, 2, 1, 0], np.int32)
PROJECTIONS = tuple(tensor_names.CLIP_PROJECTIONS)


@pytest.fixture(autouse=True)
def tiny_architectures(monkeypatch):
    tiny_clip.register(monkeypatch)


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def clip(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"clip_{request.param}")
    model = tiny_clip.clip_model(request.param)
    tiny_clip.save(model, folder)
    tiny_clip.write_tokenizer(folder)
    return model, folder


def build(folder, tasks=(TASK,), **changes):
    options = {"architecture": "tiny_clip", "checkpoint": str(folder), "logit_scale": 0.0}
    return models.build_classifier(ModelConfig(**{**options, **changes}), list(tasks))


def relative(found, expected):
    found = np.asarray(found, np.float64)
    expected = expected.detach().numpy() if hasattr(expected, "detach") else np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def prompt_ids(folder, template):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    prompts = [template.format(name) for name in TASK.class_names]
    return tokenizer(prompts, padding="max_length", max_length=24, return_tensors="pt").input_ids


def test_image_embeddings_and_logits(clip):
    theirs, folder = clip
    pixels = tiny_clip.pixel_values(IMAGES, tiny_clip.TINY_CLIP)
    one_template = tiny_clip.task(templates=("a photo of a {}.",))
    with torch.no_grad():
        expected = theirs(input_ids=prompt_ids(folder, "a photo of a {}."), pixel_values=pixels)
    ours = build(folder, [one_template])
    features = jax.jit(ours.features)(ours.base, ours.frozen, IMAGES)
    features = features / jnp.linalg.norm(features, axis=1, keepdims=True)
    logits = jax.jit(ours.logits)(ours.base, ours.frozen, IMAGES, jnp.int32(0))
    errors = [
        relative(features, expected.image_embeds),
        relative(ours.frozen["heads"][0], expected.text_embeds),
        relative(logits, expected.logits_per_image),
    ]
    print("image, text, logits: relative errors", errors)
    assert max(errors) < 1e-4
    assert np.asarray(logits).std() > 0.1


@pytest.mark.parametrize("end", [2, 10, len(tiny_clip.TOKENS) - 1])
def test_text_features_at_the_end_token(end, tmp_path):
    theirs = tiny_clip.clip_model(eos_token_id=end)
    tiny_clip.save(theirs, tmp_path)
    architecture = checked_architecture(tmp_path, tiny_clip.TINY_CLIP)
    assert architecture.end_token == end
    shapes = parameter_shapes(lambda rngs: VisionTower(architecture, rngs=rngs))
    _, values, scale = pretrained.read_towers(tmp_path, architecture, shapes, text=True)
    ids = np.random.default_rng(1).integers(11, len(tiny_clip.TOKENS) - 1, (5, 24))
    ids[np.arange(5), [3, 9, 12, 20, 23]] = end if end != 2 else len(tiny_clip.TOKENS) - 1
    ids[0, 15] = ids[0, 3]  # the first one counts
    with torch.no_grad():
        expected = theirs.get_text_features(torch.tensor(ids)).pooler_output
    embed = pretrained.text_embedding(architecture, values)
    assert relative(embed(ids.astype(np.int32)), expected) < 1e-4
    assert scale == pytest.approx(np.exp(2.6592), rel=1e-5)


@pytest.mark.parametrize("kind", ["CLIPVisionModelWithProjection", "CLIPVisionModel"])
def test_vision_towers_alone(kind, tmp_path):
    config = transformers.CLIPVisionConfig(
        **tiny_clip.vision_sizes(), projection_dim=tiny_clip.TINY_CLIP.projection
    )
    theirs = tiny_clip.randomised(getattr(transformers, kind)(config))
    tiny_clip.save(theirs, tmp_path)
    with torch.no_grad():
        expected = theirs(tiny_clip.pixel_values(IMAGES, tiny_clip.TINY_CLIP))
    expected = expected.image_embeds if "With" in kind else expected.pooler_output
    ours = build(tmp_path, head="trained")
    features = jax.jit(ours.features)(ours.base, ours.frozen, IMAGES)
    assert relative(features, expected) < 1e-4
    with pytest.raises(ValueError, match="does not have"):
        build(tmp_path)


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel"])
def test_vit(kind, tmp_path, caplog):
    config = transformers.ViTConfig(**tiny_clip.vision_sizes())
    theirs = tiny_clip.randomised(getattr(transformers, kind)(config))
    tiny_clip.save(theirs, tmp_path)
    body = theirs.vit if hasattr(theirs, "vit") else theirs
    with torch.no_grad():
        pixels = tiny_clip.pixel_values(IMAGES, tiny_clip.TINY_VIT)
        expected = body(pixels).last_hidden_state[:, 0]
    with caplog.at_level("INFO"):
        ours = build(tmp_path, architecture="tiny_vit", head="trained")
    left_out = "classifier.bias" if kind == "ViTForImageClassification" else "pooler.dense.bias"
    assert left_out in caplog.text
    assert relative(jax.jit(ours.features)(ours.base, ours.frozen, IMAGES), expected) < 1e-4


def images_of(size, count=3):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def test_a_clip_of_any_shape_is_read_from_its_config_json(tmp_path):
    """Patches that leave a margin, odd widths, another activation and epsilon in each tower."""
    sizes = tiny_clip.vision_sizes(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=1, intermediate_size=40
    )
    sizes |= {"image_size": 30, "patch_size": 7, "hidden_act": "gelu_new", "layer_norm_eps": 1e-2}
    text = tiny_clip.text_sizes(hidden_act="relu", num_hidden_layers=1, layer_norm_eps=1e-3)
    config = transformers.CLIPConfig(vision_config=sizes, text_config=text, projection_dim=11)
    theirs = tiny_clip.randomised(transformers.CLIPModel(config))
    tiny_clip.save(theirs, tmp_path)
    tiny_clip.write_tokenizer(tmp_path)
    pictures = images_of(30)
    split = tiny_clip.Split(pictures, np.zeros(3, np.int32))
    task = dataclasses.replace(
        tiny_clip.task(templates=("{}",)), train=split, validation=split, test=split
    )
    ours = build(tmp_path, [task], architecture="clip")
    with torch.no_grad():
        pixels = tiny_clip.pixel_values(pictures, tiny_clip.TINY_CLIP)
        expected = theirs(input_ids=prompt_ids(tmp_path, "{}"), pixel_values=pixels)
    logits = jax.jit(ours.logits)(ours.base, ours.frozen, pictures, jnp.int32(0))
    assert ours.frozen["heads"].shape == (1, 3, 11)
    assert relative(logits, expected.logits_per_image) < 1e-4


def test_a_vit_of_any_shape_is_read_from_its_config_json(tmp_path):
    sizes = tiny_clip.vision_sizes(
        hidden_size=20, num_attention_heads=5, num_hidden_layers=2, intermediate_size=12
    )
    sizes |= {"image_size": 18, "patch_size": 4, "hidden_act": "silu", "layer_norm_eps": 1e-3}
    config = transformers.ViTConfig(**sizes)
    theirs = tiny_clip.randomised(transformers.ViTForMaskedImageModeling(config))
    tiny_clip.save(theirs, tmp_path)
    pictures = images_of(18)
    split = tiny_clip.Split(pictures, np.zeros(3, np.int32))
    task = dataclasses.replace(tiny_clip.task(), train=split, validation=split, test=split)
    ours = build(tmp_path, [task], architecture="vit", head="trained")
    with torch.no_grad():
        pixels = tiny_clip.pixel_values(pictures, tiny_clip.TINY_VIT)
        expected = theirs.vit(pixels).last_hidden_state[:, 0]
    assert relative(jax.jit(ours.features)(ours.base, ours.frozen, pictures), expected) < 1e-4


def test_bfloat16(clip):
    theirs, folder = clip
    with torch.no_grad():
        expected = theirs.get_image_features(
            tiny_clip.pixel_values(IMAGES, tiny_clip.TINY_CLIP)
        ).pooler_output
    ours = build(folder, compute_dtype="bfloat16")
    features = jax.jit(ours.features)(ours.base, ours.frozen, IMAGES)
    assert features.dtype == jnp.float32
    assert ours.frozen["backbone"]["blocks"]["query"]["kernel"].dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(ours.base))
    error = relative(features, expected)
    print("bfloat16 features: relative error", error)
    assert 1e-4 < error < 4e-2


def cross_entropy(model, params, task=0):
    logits = model.logits(params, model.frozen, IMAGES, jnp.int32(task))
    return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(len(LABELS)), LABELS])


def torch_loss(body, heads, scale):
    features = body(tiny_clip.pixel_values(IMAGES, tiny_clip.TINY_CLIP)).image_embeds
    features = features / features.norm(dim=-1, keepdim=True)
    logits = scale * features @ torch.tensor(np.asarray(heads)).T
    return torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS).long())


def vision_model(clip):
    """The CLIPVisionModelWithProjection that the whole model's checkpoint holds."""
    config = clip[0].config.vision_config
    config.projection_dim = tiny_clip.TINY_CLIP.projection
    body = transformers.CLIPVisionModelWithProjection(config)
    state = clip[0].state_dict()
    body.load_state_dict({name: state[name] for name in body.state_dict()})
    return body.eval(), clip[0].logit_scale.exp().item()


def test_lora_gradients(clip):
    peft = pytest.importorskip("peft")
    body, scale = vision_model(clip)
    ours = build(clip[1], lora_rank=4, lora_alpha=6.0, lora_targets=PROJECTIONS)
    params = jax.tree.map(
        lambda leaf, key: leaf + 0.1 * jax.random.normal(key, leaf.shape),
        ours.base,
        jax.tree.unflatten(
            jax.tree.structure(ours.base),
            list(jax.random.split(jax.random.key(0), len(jax.tree.leaves(ours.base)))),
        ),
    )
    targets = [name.split(".")[-1] for name in tensor_names.CLIP_PROJECTIONS.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and PEFT's own deprecations
        adapted = peft.get_peft_model(
            body, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, bias="none")
        )
    theirs = {}
    for path, leaf in leaf_items(params):
        projection, part = path.split("/")[1:]
        letter = part[-1].upper()
        for layer, value in enumerate(np.asarray(leaf)):
            name = f".layers.{layer}.{tensor_names.CLIP_PROJECTIONS[projection]}"
            name += f".lora_{letter}.default.weight"
            (match,) = [p for n, p in adapted.named_parameters() if n.endswith(name)]
            assert match.requires_grad
            match.data.copy_(torch.tensor(value.T))
            theirs[path, layer] = match
    assert len(theirs) == sum(p.requires_grad for p in adapted.parameters())
    expected_loss = torch_loss(adapted, ours.frozen["heads"][0], scale)
    expected_loss.backward()
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: cross_entropy(ours, p)))(params)
    assert float(loss) == pytest.approx(expected_loss.item(), rel=1e-5)
    errors = {
        path: relative(leaf, np.stack([theirs[path, i].grad.numpy().T for i in range(len(leaf))]))
        for path, leaf in leaf_items(gradient)
    }
    assert len(errors) == 2 * len(PROJECTIONS)
    print("gradients: largest relative error", max(errors.values()))
    assert max(errors.values()) < 1e-4, errors


def test_full_gradients(clip):
    body, scale = vision_model(clip)
    ours = build(clip[1], trainable="full")
    torch_loss(body, ours.frozen["heads"][0], scale).backward()
    gradient = jax.jit(jax.grad(lambda p: cross_entropy(ours, p)))(ours.base)
    tensors = {name: parameter.grad.numpy() for name, parameter in body.named_parameters()}
    expected = tensor_names.from_huggingface(tensors, "clip_vision", gradient)
    errors = {}
    for (path, found), (_, leaf) in zip(leaf_items(gradient), leaf_items(expected), strict=True):
        if path == "blocks/key/bias":  # softmax does not see it: both are rounding errors
            assert np.abs(np.asarray(found)).max() < 1e-5
        else:
            errors[path] = relative(found, leaf)
    print("gradients: largest relative error", max(errors.values()))
    assert max(errors.values()) < 1e-4, errors


def test_zero_shot_heads_average_templates(clip):
    theirs, folder = clip
    with torch.no_grad():
        parts = []
        for template in TASK.templates:
            part = theirs.get_text_features(prompt_ids(folder, template)).pooler_output
            parts.append(part / part.norm(dim=-1, keepdim=True))
        expected = torch.stack(parts).mean(0)
        expected = expected / expected.norm(dim=-1, keepdim=True)
    other = tiny_clip.task("letters", ("a", "b", "c", "d", "e"), ("{}",))
    ours = build(folder, [other, TASK])
    assert ours.frozen["heads"].shape == (2, 5, tiny_clip.TINY_CLIP.projection)
    assert relative(ours.frozen["heads"][1, :3], expected) < 1e-4
    np.testing.assert_array_equal(ours.frozen["heads"][1, 3:], 0)


def test_towers_go_back_to_torch(clip):
    theirs, folder = clip
    architecture = checked_architecture(folder, tiny_clip.TINY_CLIP)
    shapes = parameter_shapes(lambda rngs: VisionTower(architecture, rngs=rngs))
    vision, text, _ = pretrained.read_towers(folder, architecture, shapes, text=True)
    tensors = tensor_names.to_huggingface(vision, "clip_vision")
    tensors |= tensor_names.to_huggingface(text, "clip_text")
    expected = theirs.state_dict()
    assert tensors.keys() == expected.keys() - {"logit_scale"}
    for name, tensor in tensors.items():
        assert tensor.flags.c_contiguous
        np.testing.assert_array_equal(tensor, expected[name].numpy(), err_msg=name)
