"""How each diagnostic is to be read: one line each, for the report."""

# The keys are the names of `pae_jax.diagnostics`; rms is the root of the mean square, of pixels in
# [0, 1].
READINGS = {
    "on_manifold_bias": "Rms change of normal images by f; 0 for a projection. "
    "Defects as faint as this are lost in it.",
    "idempotency": "Rms change of f(x̂) by a second application; 0 for a projection.",
    "error_outside_mask": "Rms error where nothing was corrupted; the lower, the fewer false "
    "alarms.",
    "error_inside_mask": "Rms error where the image was corrupted; 0 if f restores it exactly.",
    "contraction_1": "Distance to the clean image after one application, divided by that before; "
    "below 1 f comes closer.",
    "contraction_2": "The same ratio of the second application; near 1 if the first did all.",
    "contraction_3": "The same ratio of the third application; above 1 f drifts away again.",
    "fixed_point_steps": "Applications of f until the iteration stops; at most 2 for a projection.",
    "fixed_point_converged": "Fraction of the images whose iteration met its tolerance; 1 if "
    "fixed points can be relied on.",
    "fixed_point_error": "Rms distance of the last iterate from the clean image; above "
    "error_inside_mask the iteration loses normal detail.",
    "jacobian_identity": "‖J − I‖/√d at corrupted images: 0 if f keeps every small change, so also "
    "defects; near 1 for a projection onto few dimensions.",
    "tangent_distortion": "Change of a small step towards the nearest normal image; 0 if f keeps "
    "normal variation, 1 if f removes it.",
    "corruption_suppression": "Change of a small corruption; 1 if f removes it, 0 if f keeps it.",
    "spectral_radius": "Growth of a small change under repeated application; 1 for a projection, "
    "above 1 f is unstable.",
    "normal_dominance": "Part of the corruptions along normal variation, divided by the part "
    "across; the theory asks for less than 1 (eq. 14).",
}
