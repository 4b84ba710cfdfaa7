"""tinydance: PixelDance (Make Pixels Dance, arXiv 2311.10982) in PyTorch, to read and to train.

A clip is made from three instructions: text, the first frame and, if wanted, the last frame.

    paper              code                          shape              where it lives
    -----------------  ----------------------------  -----------------  --------------------------
    I^first, I^last    I_first, I_last               b 3 H W, [-1, 1]   sampling.py
    f^first, f^last    f_first, f_last               b 4 h w            conditioning.py
    c^image (Eq. 1)    make_c_image -> c_image       b f 4 h w          conditioning.py
    PADs               zeros between the two                            conditioning.py
    c^text             encode_text -> c_text         b l d              clip.py, model.py
    z, z_t             z_0, z_t                      b f 4 h w          schedulers.py, training.py
    epsilon            eps; out, what is predicted   b f 4 h w          schedulers.py
    alpha-bar_t        alpha_bar[t]                  T                  schedulers.py
    T                  num_train_timesteps                              config.py
    t (diffusion)      t in 0..T-1                   b                  schedulers.py
    t (Eq. 2)          i, counted from pure noise                       sampling.py
    tau (Eq. 2)        tau                                              sampling.py
    eta                eta, drops the last frame                        config.py, training.py
    x~_theta (Eq. 2)   guided_denoiser                                  sampling.py
    x^_theta           UNet                          b f 8 h w -> 4     unet.py

Letters: b batch, f frames, c channels, h w height and width of latents, H W of pixels, l text
tokens, d width. DDIM's own eta is ddim_eta; w = 1 switches guidance off.

Read in this order: schedulers, conditioning, noise, sampling, story, model, unet, training,
checkpoints, stages, train.py, vae, clip, weights, data, sources, latents, inspection, toyworld,
video, config, progress, sample.py, evaluate, figures; then the tests of conditioning, sampling and
training, which are the claims, executable.
"""

__version__ = "0.1.0"
