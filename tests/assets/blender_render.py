"""Run by Blender's Python (the package bpy): import files and render them in even white light.

    python blender_render.py jobs.json

``jobs.json`` is a list of {"file", "picture", "camera" (4 x 4, camera to Blender's world, OpenGL's
axes), "fovy" (degrees), "size" (pixels)}.
"""

import json
import math
import sys
from pathlib import Path

import bpy
from mathutils import Matrix

SAMPLES = 64  # of each pixel


def import_file(path: Path) -> None:
    as_it_is = {"filepath": str(path), "forward_axis": "Y", "up_axis": "Z"}
    if path.suffix == ".glb":
        bpy.ops.import_scene.gltf(filepath=str(path))
    elif path.suffix == ".obj":
        bpy.ops.wm.obj_import(**as_it_is)
    else:
        bpy.ops.wm.ply_import(**as_it_is)
        for thing in bpy.context.scene.objects:
            thing.data.materials.append(of_vertex_colors(thing.data.color_attributes[0].name))


def of_vertex_colors(name: str):
    """What an artist makes for a file without materials."""
    material = bpy.data.materials.new("colours")
    material.use_nodes = True
    nodes = material.node_tree.nodes
    surface = next(node for node in nodes if node.type == "BSDF_PRINCIPLED")
    surface.inputs["Roughness"].default_value = 1.0
    surface.inputs["Specular IOR Level"].default_value = 0.0
    colors = nodes.new("ShaderNodeVertexColor")
    colors.layer_name = name
    material.node_tree.links.new(colors.outputs["Color"], surface.inputs["Base Color"])
    return material


def set_up(job: dict) -> None:
    """Light of strength 1 from everywhere, in which a surface that is dull all over has its own
    colour, and sRGB without any look."""
    scene = bpy.context.scene
    world = bpy.data.worlds.new("white")
    world.use_nodes = True
    light = world.node_tree.nodes["Background"].inputs
    light["Color"].default_value, light["Strength"].default_value = (1, 1, 1, 1), 1.0
    world.cycles.sampling_method = "NONE"  # by the surface's own rays alone, without noise
    scene.world = world
    scene.render.engine = "CYCLES"
    scene.cycles.samples, scene.cycles.max_bounces = SAMPLES, 1
    scene.cycles.use_adaptive_sampling = scene.cycles.use_denoising = False
    scene.cycles.pixel_filter_type = "BOX"
    scene.render.film_transparent = True
    scene.render.resolution_x = scene.render.resolution_y = job["size"]
    scene.render.resolution_percentage = 100
    scene.render.dither_intensity = 0.0
    scene.render.threads_mode, scene.render.threads = "FIXED", 1
    scene.view_settings.view_transform, scene.view_settings.look = "Standard", "None"
    scene.render.image_settings.file_format = "PNG"
    scene.render.image_settings.color_mode = "RGBA"
    camera = bpy.data.cameras.new("camera")
    camera.sensor_fit, camera.angle = "VERTICAL", math.radians(job["fovy"])
    seen = bpy.data.objects.new("camera", camera)
    seen.matrix_world = Matrix(job["camera"])
    scene.collection.objects.link(seen)
    scene.camera = seen


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        bpy.ops.wm.read_factory_settings(use_empty=True)
        import_file(Path(job["file"]))
        set_up(job)
        bpy.context.scene.render.filepath = job["picture"]
        bpy.ops.render.render(write_still=True)


main()
