"""Charts, drawings that explain, HTML, and panels."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "canvas": ["number", "panels", "show", "text_table"],
        "charts": (
            "lines strips points bars said heatmaps grid curves rates versus stacked"
        ).split(),
        "drawings": (
            "audit changed_and_fluent choices circle_to_sphere four_questions idea password_lock "
            "pushed_onto_sphere refusal_switch span_picture"
        ).split(),
        "explorer": ["GridPanel", "geometry_panel", "radius_slider", "token_panel"],
        "geometry": ["circle_toy", "clouds", "push_picture"],
        "render": (
            "render_radius render_said render_still render_texts render_token_grid render_tried "
            "render_turn"
        ).split(),
    },
)
