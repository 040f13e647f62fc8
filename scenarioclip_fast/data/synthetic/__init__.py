"""Synthetic scenes with exact boxes, masks and relations, and an action determined by the relations."""

from __future__ import annotations

from scenarioclip_fast.data.synthetic.drawings import COLOURS, KINDS
from scenarioclip_fast.data.synthetic.events import ACTIONS, HELD_OUT, TEMPLATES, Template, action_of
from scenarioclip_fast.data.synthetic.scenes import generate_scenes, render_scene, vocabulary
from scenarioclip_fast.data.synthetic.write import write_published_layout

__all__ = [
    "ACTIONS",
    "COLOURS",
    "HELD_OUT",
    "KINDS",
    "TEMPLATES",
    "Template",
    "action_of",
    "generate_scenes",
    "render_scene",
    "vocabulary",
    "write_published_layout",
]
