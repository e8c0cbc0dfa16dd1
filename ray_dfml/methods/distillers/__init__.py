"""Older methods that distil a teacher, adapted to teachers that only name a class; IDEAL's tables compare with them.

They were made for teachers whose gradients, features or probabilities are at hand. The adaptation is the same for all:
**what the teacher says is a constant one-hot vector. A term that needs the teacher's gradient is computed on the
student, and so is one that needs its features or its batch-norm statistics; a term that then says nothing is dropped.**
`adversarial` has the methods whose generator and student take turns, `inversion` those that make a batch of images, ask
about it once, and keep it, and `boundary` has ZSDB3. Loop, budget, student, and how it learns again from what was paid
for, are those of `methods.students`.
"""

from ray_dfml.methods.distillers.adversarial import DAFL as DAFL
from ray_dfml.methods.distillers.adversarial import DAST as DAST
from ray_dfml.methods.distillers.adversarial import DFME as DFME
from ray_dfml.methods.distillers.adversarial import ZSKT as ZSKT
from ray_dfml.methods.distillers.boundary import ZSDB3 as ZSDB3
from ray_dfml.methods.distillers.inversion import CMI as CMI
from ray_dfml.methods.distillers.inversion import DEEPINVERSION as DEEPINVERSION
