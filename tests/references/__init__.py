"""Independent dense references, by HIPS autograd: nothing here calls the code under test.

Networks and losses are written again from their definitions in `autograd.numpy`; gradients,
Jacobians, Fisher matrices and Hessians follow by automatic differentiation, parameter by
parameter.
"""
