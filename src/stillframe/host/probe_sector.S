# The boot sector of host/probes.py: proves that an accelerator runs 64-bit code with interrupts.
#   as --64 probe_sector.S -o p.o && ld -Ttext 0x7c00 --oformat binary p.o -o sector
.code16
.globl _start
_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    cld
    movw $0x1000, %di            # clear 0x1000-0x5fff: tables, IDT
    movw $0x5000/4, %cx
    xorl %eax, %eax
    rep stosl
    movw $0x2003, 0x1000         # first PML4 -> PDPT
    movw $0x2003, 0x4000         # second PML4 -> the same PDPT
    movw $0x3003, 0x2000         # PDPT -> PD
    movw $0x0183, 0x3000         # PD: one global page of 2 MiB
    movl $0x2a0, %eax            # CR4: PAE, PGE, OSFXSR
    movl %eax, %cr4
    movl $0x1000, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx       # EFER: LME, SCE
    rdmsr
    orl $0x101, %eax
    wrmsr
    lgdt gdtr
    movl $0x80010001, %eax       # CR0: PG, WP, PE
    movl %eax, %cr0
    ljmp $8, $long
.code64
long:
    xorl %eax, %eax
    movl %eax, %ss
    movl $0x7c00, %esp
    movl $0xc0000080, %ecx
    rdmsr
    testl $0x400, %eax           # EFER.LMA must be set
    jz fail
    xorl %eax, %eax
    cpuid
    movl $0x4000, %eax           # another page table, as every context switch does
    movq %rax, %cr3
    invlpg 0x7c00
    movq %rax, %xmm0             # SSE, as CR4.OSFXSR allows
    movq %xmm0, %rbx
    cmpq %rax, %rbx
    jne fail
    movl $tick, %eax             # IDT entry 0x20, a 64-bit interrupt gate
    movl $0x5200, %edi
    movw %ax, (%rdi)
    movl $0x8e000008, 2(%rdi)
    movw $0, 6(%rdi)
    movb $0x8e, 5(%rdi)
    lidt idtr
    movl $0x11, %eax             # 8259: vectors from 0x20, only the timer
    outb %al, $0x20
    movb $0x20, %al
    outb %al, $0x21
    movb $4, %al
    outb %al, $0x21
    movb $1, %al
    outb %al, $0x21
    movb $0xfe, %al
    outb %al, $0x21
    movb $0x34, %al              # 8254: channel 0, mode 2, 1193 counts: 1 kHz
    outb %al, $0x43
    movb $0xa9, %al
    outb %al, $0x40
    movb $0x04, %al
    outb %al, $0x40
    xorl %ebp, %ebp
wait:
    sti
    hlt
    cmpl $20, %ebp               # until twenty timer interrupts came
    jb wait
    movb $0x2a, %al              # exit code 0x2a * 2 + 1 = 85
    jmp end
fail:
    movb $1, %al
end:
    outb %al, $0xf4
halt:
    hlt
    jmp halt
tick:
    incl %ebp
    pushq %rax
    movb $0x20, %al
    outb %al, $0x20
    popq %rax
    iretq
.balign 8
gdt:
    .quad 0
    .quad 0x00209a0000000000     # 64-bit code
gdtr:
    .word 15
    .long gdt
idtr:
    .word 0xfff
    .quad 0x5000
.org 510
    .word 0xaa55
