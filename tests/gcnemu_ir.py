"""Kernels in LLVM IR that handle LDS themselves: right ones, and ones with a known bug."""

from __future__ import annotations

HEAD = """
target triple = "amdgcn-amd-amdhsa"
@tile = internal addrspace(3) global [256 x float] poison, align 16
declare i32 @llvm.amdgcn.workitem.id.x()
declare void @llvm.amdgcn.s.barrier()
declare void @llvm.amdgcn.s.waitcnt(i32)
declare void @llvm.amdgcn.global.load.lds(ptr addrspace(1), ptr addrspace(3), i32, i32, i32)
attributes #0 = { "amdgpu-flat-work-group-size"="256,256" "amdgpu-no-dispatch-ptr" }
"""

# 256 work-items turn 256 floats around through LDS. Each reads what another wave wrote.
REVERSE = (
    HEAD
    + """
define amdgpu_kernel void @reverse(ptr addrspace(1) %x, ptr addrspace(1) %out) #0 {
  %tid = call i32 @llvm.amdgcn.workitem.id.x()
  %i = zext i32 %tid to i64
  %from = getelementptr float, ptr addrspace(1) %x, i64 %i
  %v = load float, ptr addrspace(1) %from
  %put = getelementptr float, ptr addrspace(3) @tile, i32 PLACE
  store volatile float %v, ptr addrspace(3) %put
  BARRIER
  %other = sub i32 255, %tid
  %get = getelementptr float, ptr addrspace(3) @tile, i32 %other
  %r = load volatile float, ptr addrspace(3) %get
  %to = getelementptr float, ptr addrspace(1) %out, i64 %i
  store float %r, ptr addrspace(1) %to
  ret void
}
"""
)


def reverse(barrier: bool = True, shift: int = 0) -> str:
    """Without the barrier a race; with a shift, writes past the 1024 bytes of LDS."""
    text = REVERSE.replace("BARRIER", "call void @llvm.amdgcn.s.barrier()" if barrier else "")
    if not shift:
        return text.replace("PLACE", "%tid")
    return text.replace("PLACE", "%place").replace(
        "  %put =", f"  %place = add i32 %tid, {shift}\n  %put ="
    )


# The simm16 of s_waitcnt: vmcnt in bits 3..0 and 15..14, expcnt in 6..4, lgkmcnt in 11..8.
WAIT_VM = 0x0F70
WAIT_LGKM = 0xC07F

# Each work-item copies its float into LDS asynchronously and reads it back from assembly code.
COPY = (
    HEAD
    + """
define amdgpu_kernel void @copy(ptr addrspace(1) %x, ptr addrspace(1) %out) #0 {
  %tid = call i32 @llvm.amdgcn.workitem.id.x()
  %i = zext i32 %tid to i64
  %from = getelementptr float, ptr addrspace(1) %x, i64 %i
  %first = call i32 asm "v_readfirstlane_b32 $0, $1", "=s,v"(i32 %tid)
  %slot = getelementptr float, ptr addrspace(3) @tile, i32 %first
  call void @llvm.amdgcn.global.load.lds(ptr addrspace(1) %from, ptr addrspace(3) %slot, i32 4, i32 0, i32 0)
  call void @llvm.amdgcn.s.waitcnt(i32 WAIT)
  %address = ptrtoint ptr addrspace(3) @tile to i32
  %mine = shl i32 %tid, 2
  %at = add i32 %address, %mine
  %r = call float asm sideeffect "ds_read_b32 $0, $1\\0As_waitcnt lgkmcnt(0)", "=v,v"(i32 %at)
  %to = getelementptr float, ptr addrspace(1) %out, i64 %i
  store float %r, ptr addrspace(1) %to
  ret void
}
"""
)


def copy(wait: int = WAIT_VM) -> str:
    """An LDS-DMA is counted by vmcnt; waiting for lgkmcnt does not wait for it."""
    return COPY.replace("WAIT", str(wait))


def assembly(arch: str, body: str, *, scratch: int = 0, user: int = 2, extra: str = "") -> str:
    """A kernel `k` of two pointers, in s[4:5] and s[6:7], with this code."""
    return f"""
.amdgcn_target "amdgcn-amd-amdhsa--{arch}"
.text
.globl k
.p2align 8
.type k,@function
k:
  s_load_dwordx4 s[4:7], s[0:1], 0x0
  s_waitcnt lgkmcnt(0)
  {body}
  s_endpgm
.Lfunc_end0:
.size k, .Lfunc_end0-k
.rodata
.p2align 6
.amdhsa_kernel k
  .amdhsa_user_sgpr_kernarg_segment_ptr 1
  .amdhsa_user_sgpr_count {user}
  .amdhsa_next_free_vgpr 8
  .amdhsa_next_free_sgpr 16
  .amdhsa_accum_offset 8
  .amdhsa_kernarg_size 16
  .amdhsa_private_segment_fixed_size {scratch}
{extra}
.end_amdhsa_kernel
.amdgpu_metadata
---
amdhsa.version: [1, 2]
amdhsa.kernels:
  - .name: k
    .symbol: k.kd
    .kernarg_segment_size: 16
    .kernarg_segment_align: 8
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: {scratch}
    .wavefront_size: 64
    .sgpr_count: 16
    .vgpr_count: 8
    .max_flat_workgroup_size: 64
    .args:
      - {{.offset: 0, .size: 8, .value_kind: global_buffer}}
      - {{.offset: 8, .size: 8, .value_kind: global_buffer}}
...
.end_amdgpu_metadata
"""
