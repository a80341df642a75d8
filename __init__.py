"""Concept Atelier: a ComfyUI node pack that teaches a diffusion model from a handful of pictures.

Inside ComfyUI this folder is a custom node, found through `comfy_entrypoint`; outside, it is the package
`concept_atelier`, which needs no ComfyUI. Nothing is imported before one of the two is known.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls once when it loads the pack: returns the extension that lists the nodes."""
    from comfy_api.latest import ComfyExtension

    from .nodes import (
        anchor_loss,
        apply,
        attention,
        attention_loss,
        compare,
        data,
        detection,
        files,
        gradient,
        guidance,
        inversion,
        layout_guidance,
        masks,
        nulltext,
        pick_reference,
        prior,
        reference,
        replacement,
        tokens,
        toy,
        train,
        train_nulltext,
        triples,
        weights,
    )
    from .nodes.native import live

    class ConceptAtelier(ComfyExtension):
        async def on_load(self):
            live.register_routes()

        async def get_node_list(self):
            modules = (
                data,
                triples,
                tokens,
                gradient,
                anchor_loss,
                attention_loss,
                prior,
                weights,
                train,
                files,
                apply,
                guidance,
                layout_guidance,
                nulltext,
                train_nulltext,
                masks,
                detection,
                inversion,
                replacement,
                pick_reference,
                reference,
                attention,
                compare,
                toy,
            )
            return [node for module in modules for node in module.NODES]

    return ConceptAtelier()
