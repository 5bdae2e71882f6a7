"""How large a change is, what a text does, scores and intervals."""

import lazy_loader

_DOORS = {
    "behaviours": "answer_of cut is_right kind_of_answer mentions payload reads_well refuses"
    " works_in_steps",
    "changes": "change kl kl_from_clean log_probabilities scaled_to_effect",
    "fluency": "distinct2 variety",
    "judges": "FluentRange agreement errors is_changed is_fluent judged_by_rule kappa"
    " kappa_line labels of_effect read_again shares_as_read",
    "judging": "agreement_with_labels judge",
    "statistics": "auc bootstrap mahalanobis missed needed nested permutation_p ranks roc wilson",
    "text": "FIRST_SCORED distance embed fluent_range joined own_spread read surprise token_nll",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _DOORS.items()}
)
