"""The six species: their proportions, and the keypoints and parts that they share."""

from dataclasses import dataclass

KEYPOINTS = (
    "eye",
    "nose",
    "head_top",
    "neck_base",
    "back",
    "belly",
    "hip",
    "tail_base",
    "tail_mid",
    "tail_tip",
    "near_front_knee",
    "near_front_foot",
    "near_back_knee",
    "near_back_foot",
    "far_front_foot",
    "far_back_foot",
    "wing_tip",
)


@dataclass(frozen=True)
class Species:
    """The proportions of a species, in units of ``size``/64 of the frame at scale 1; angles in degrees.

    Angles of neck, tail and wing are measured from straight ahead, upwards positive; those of a leg from straight
    down, forwards positive; that of the head from straight ahead, downwards positive.

    Attributes:
        legs: 2 or 4; a two-legged species has no front legs.
        body_length: from the middle of the chest to the middle of the hip.
        body_tilt: how far the chest is lifted above the hip.
        body_radii: of chest and hip.
        neck_length: from the base of the neck to the middle of the head.
        neck_angle: at rest.
        neck_radii: at the base and at the head.
        head_radius: of the skull.
        head_angle: at rest.
        snout_length: from the middle of the head to the tip.
        snout_radii: at the head and at the tip.
        beak: whether the snout is a beak.
        eye_radius: of the white of the eye.
        ear_length: 0 where there is none.
        ear_angle: where the ear points, from straight ahead, upwards positive.
        ear_radii: at the root and at the tip.
        horn_length: 0 where there is none.
        horn_angle: as for the ear.
        mane: whether the back of the neck has one.
        spikes: whether neck and back have them.
        leg_length: of the upper and the lower half.
        leg_radii: at the top, at the knee and at the foot.
        foot_length: how far the foot reaches forward.
        front_angles: of the upper and the lower half of a front leg, at rest.
        back_angles: the same of a back leg.
        back_leg_place: where a back leg starts, from 0 at the hip to 1 at the chest.
        tail_lengths: of the first and the second half.
        tail_angles: of the two halves, at rest.
        tail_radii: at the base, in the middle and at the tip.
        tail_spade: length of the pointed tip, 0 where there is none.
        wing_length: 0 where there is none.
        wing_angle: at rest.
        membrane: whether the wing is a skin stretched between fingers.
        size: what every length is multiplied by.
    """

    legs: int
    body_length: float
    body_tilt: float
    body_radii: tuple[float, float]
    neck_length: float
    neck_angle: float
    neck_radii: tuple[float, float]
    head_radius: float
    head_angle: float
    snout_length: float
    snout_radii: tuple[float, float]
    leg_length: tuple[float, float]
    leg_radii: tuple[float, float, float]
    tail_lengths: tuple[float, float]
    tail_angles: tuple[float, float]
    tail_radii: tuple[float, float, float]
    foot_length: float = 1.6
    front_angles: tuple[float, float] = (6.0, -6.0)
    back_angles: tuple[float, float] = (14.0, -16.0)
    back_leg_place: float = 0.0
    beak: bool = False
    eye_radius: float = 1.35
    ear_length: float = 0.0
    ear_angle: float = 110.0
    ear_radii: tuple[float, float] = (1.3, 0.6)
    horn_length: float = 0.0
    horn_angle: float = 100.0
    mane: bool = False
    spikes: bool = False
    tail_spade: float = 0.0
    wing_length: float = 0.0
    wing_angle: float = 0.0
    membrane: bool = False
    size: float = 1.0


TABLE = {
    "dog": Species(
        legs=4,
        body_length=14.0,
        body_tilt=4.0,
        body_radii=(5.4, 4.6),
        neck_length=7.5,
        neck_angle=48.0,
        neck_radii=(4.0, 3.4),
        head_radius=5.0,
        head_angle=12.0,
        snout_length=7.8,
        snout_radii=(3.2, 2.3),
        leg_length=(6.0, 6.0),
        leg_radii=(2.7, 1.9, 1.6),
        tail_lengths=(5.5, 4.5),
        tail_angles=(128.0, 100.0),
        tail_radii=(1.7, 1.5, 1.0),
        ear_length=7.0,
        ear_angle=-108.0,
        ear_radii=(1.6, 2.3),
        size=1.25,
    ),
    "horse": Species(
        legs=4,
        body_length=17.0,
        body_tilt=3.0,
        body_radii=(5.8, 5.7),
        neck_length=14.0,
        neck_angle=52.0,
        neck_radii=(4.8, 2.9),
        head_radius=3.6,
        head_angle=38.0,
        snout_length=9.5,
        snout_radii=(3.0, 2.2),
        leg_length=(9.5, 9.5),
        leg_radii=(3.0, 1.9, 1.4),
        tail_lengths=(7.0, 8.0),
        tail_angles=(215.0, 262.0),
        tail_radii=(1.6, 2.7, 1.2),
        ear_length=4.2,
        ear_angle=108.0,
        ear_radii=(1.3, 0.5),
        mane=True,
    ),
    "giraffe": Species(
        legs=4,
        body_length=12.0,
        body_tilt=16.0,
        body_radii=(5.4, 4.4),
        neck_length=23.0,
        neck_angle=68.0,
        neck_radii=(3.8, 1.9),
        head_radius=3.1,
        head_angle=24.0,
        snout_length=7.2,
        snout_radii=(2.4, 1.7),
        leg_length=(10.5, 10.5),
        leg_radii=(2.4, 1.7, 1.3),
        tail_lengths=(5.0, 4.5),
        tail_angles=(225.0, 262.0),
        tail_radii=(0.9, 0.8, 1.6),
        eye_radius=1.2,
        ear_length=4.2,
        ear_angle=170.0,
        ear_radii=(1.1, 0.7),
        horn_length=6.2,
        horn_angle=98.0,
    ),
    "lizard": Species(
        legs=4,
        body_length=15.0,
        body_tilt=0.0,
        body_radii=(3.5, 3.4),
        neck_length=6.5,
        neck_angle=16.0,
        neck_radii=(2.9, 2.6),
        head_radius=3.1,
        head_angle=2.0,
        snout_length=7.0,
        snout_radii=(2.6, 1.4),
        leg_length=(4.6, 4.2),
        leg_radii=(1.8, 1.5, 1.2),
        foot_length=2.6,
        front_angles=(48.0, -22.0),
        back_angles=(-44.0, 24.0),
        tail_lengths=(14.0, 13.0),
        tail_angles=(186.0, 172.0),
        tail_radii=(2.9, 1.7, 0.5),
        eye_radius=1.3,
    ),
    "bird": Species(
        legs=2,
        body_length=9.0,
        body_tilt=30.0,
        body_radii=(6.6, 4.6),
        neck_length=8.0,
        neck_angle=66.0,
        neck_radii=(4.4, 3.6),
        head_radius=4.7,
        head_angle=4.0,
        snout_length=10.5,
        snout_radii=(2.3, 0.3),
        leg_length=(6.0, 5.5),
        leg_radii=(1.8, 1.4, 1.1),
        foot_length=3.2,
        back_angles=(-14.0, 16.0),
        back_leg_place=0.42,
        tail_lengths=(5.0, 5.5),
        tail_angles=(196.0, 190.0),
        tail_radii=(2.2, 2.0, 2.9),
        beak=True,
        eye_radius=1.5,
        wing_length=14.0,
        wing_angle=182.0,
        size=1.12,
    ),
    "dragon": Species(
        legs=4,
        body_length=14.0,
        body_tilt=8.0,
        body_radii=(5.4, 4.8),
        neck_length=12.0,
        neck_angle=54.0,
        neck_radii=(3.9, 2.6),
        head_radius=3.8,
        head_angle=14.0,
        snout_length=8.0,
        snout_radii=(2.9, 1.9),
        leg_length=(6.0, 5.5),
        leg_radii=(2.8, 2.0, 1.6),
        foot_length=2.2,
        tail_lengths=(10.0, 10.0),
        tail_angles=(196.0, 158.0),
        tail_radii=(3.2, 2.0, 0.9),
        horn_length=7.6,
        horn_angle=146.0,
        spikes=True,
        tail_spade=4.4,
        wing_length=19.0,
        wing_angle=104.0,
        membrane=True,
    ),
}

SPECIES = tuple(TABLE)
