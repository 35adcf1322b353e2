"""What is asked about a scene: questions in R4D-Bench's nine categories, each with its exact answer.

A template asks only where the truth is clear to someone who sees the clip: regions must be well visible in the first
frame and stay in view, directions must lie well within their sector, speeds must differ clearly. `balance` in
`p4dprep.worlds.questions` then adds the distractors.
"""

from collections.abc import Sequence

from p4dprep.worlds.dynamic_templates import DYNAMIC_TEMPLATES, PLAIN_DYNAMIC_TEMPLATES
from p4dprep.worlds.questions import Query
from p4dprep.worlds.scene import PLAIN_SPLITS, Scene
from p4dprep.worlds.static_templates import PLAIN_STATIC_TEMPLATES, SINGLE_STATIC_TEMPLATES, STATIC_TEMPLATES
from p4dprep.worlds.tracks import ObjectFacts
from p4dprep.worlds.view import View

_NOT_PLAIN = ("sa_speed_at", "dp_path")
"""Asked about full worlds only: in plain ones there are numbers enough."""


def ask(scene: Scene, facts: Sequence[ObjectFacts]) -> tuple[Query, ...]:
    """Everything that can be asked about a scene; the same for the same scene, nothing for one without bodies.

    Args:
        scene: the world.
        facts: of all its bodies, from the clip's first frame to its last.
    """
    if not scene.bodies:
        return ()
    view = View(scene, facts)
    if scene.split in PLAIN_SPLITS:
        static = SINGLE_STATIC_TEMPLATES if scene.setting == "single" else PLAIN_STATIC_TEMPLATES
        templates = (*static, *PLAIN_DYNAMIC_TEMPLATES)
        return tuple(query for template in templates for query in template(view) if query.template not in _NOT_PLAIN)
    return tuple(query for template in (*STATIC_TEMPLATES, *DYNAMIC_TEMPLATES) for query in template(view))
