"""Readers of the datasets that `robustbench_ext.named_data` names: one file per family, and what they share.

checking   checksums, verified once and remembered; web pages saved in the place of a download
options    what follows the # of a specification
imaging    image files as float32 batches: resized, cropped, read when they are asked for
cifar, idx, svhn, stl10, imagenet, adaptation, medmnist      the families
"""
