"""tinydance: PixelDance (Make Pixels Dance, arXiv 2311.10982) in PyTorch, to read and to train.

A clip is made from three instructions: text, the first frame and, if wanted, the last frame.

    paper              code                          shape              where it lives
    -----------------  ----------------------------  -----------------  --------------------------
    I^first, I^last    I_first, I_last               b 3 H W, [-1, 1]   sampling.py
    f^first, f^last    instructions: first, last     b 4 h w            conditioning.py
    c^image (Eq. 1)    make_c_image -> c_image       b f 4 h w          conditioning.py
    PADs               zeros between the two                            conditioning.py
    c^text             encode_text -> c_text         b l d              clip.py, model.py
    z, z_t             z_0, z_t                      b f 4 h w          schedulers.py, training.py
    epsilon            eps; out, what is predicted   b f 4 h w          schedulers.py
    alpha-bar_t        alpha_bar[t]                  T                  schedulers.py
    T                  num_train_timesteps                              schedulers.py
    t (diffusion)      t in 0..T-1                   b                  schedulers.py
    t (Eq. 2)          i, counted from pure noise                       sampling.py
    tau (Eq. 2)        tau                                              sampling.py
    eta                eta, drops the last frame                        training.py
    x~_theta (Eq. 2)   guided_denoiser                                  sampling.py
    x^_theta           UNet, asked by `ask`          b f 8 h w -> 4     unet.py, conditioning.py

Letters: b batch, f frames, c channels, h w height and width of latents, H W of pixels, l text
tokens, d width. DDIM's own eta is ddim_eta; w = 1 switches guidance off.

The core, to be read end to end in this order:
    1  schedulers.py     noise in and out              5  training.py        the loss and the steps
    2  conditioning.py   c_image; asking the network   6  vae.py, clip.py    borrowed from SD, CLIP
    3  sampling.py       guidance, tau, chains         7  model.py, noise.py, config.py   the parts
    4  unet.py           the pseudo-3D UNet               together; randomness; every choice

The rooms, to be opened when needed, each by its README.md, and variants/, what others change:
    weights/   other people's files in and out         data/     clips to train on
    video/     pixels in files; films                  run/      a training from start to end
    toy/       the procedural world and its models     metrics/  FVD and its kin
Imports go one way: weights < core < video < toy < data < metrics < run < train.py, sample.py.
"""

__version__ = "0.1.0"
