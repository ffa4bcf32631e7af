# The guest of host/probes.py for VMMs that boot ELF kernels by the PVH protocol and no boot sector.
# It does what probe_sector.S does (64-bit code, another page table, SSE, timer interrupts out of hlt),
# says OK on the serial port, and has the keyboard controller reset it, which ends a Firecracker.
#   gcc -nostdlib -static -no-pie -Wl,-N,-Ttext-segment=0x100000,--build-id=none probe_kernel.S -o k
#   objcopy -S k kernel
.section .note.Xen, "a", @note
.balign 4
    .long 4, 8, 18                # sizes of name and value, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad _start
.text
.code32
.globl _start
_start:
    cli
    cld
    movl $0x200000, %edi         # clear 0x200000-0x205fff: tables, IDT
    movl $0x6000 / 4, %ecx
    xorl %eax, %eax
    rep stosl
    movl $0x202003, 0x200000     # first PML4 -> PDPT
    movl $0x202003, 0x201000     # second PML4 -> the same PDPT
    movl $0x203003, 0x202000     # PDPT -> PD
    movl $0x000183, 0x203000     # PD: two global pages of 2 MiB
    movl $0x200183, 0x203008
    movl $0x2a0, %eax            # CR4: PAE, PGE, OSFXSR
    movl %eax, %cr4
    movl $0x200000, %eax
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
    movl $0x206000, %esp
    movl $0xc0000080, %ecx
    rdmsr
    testl $0x400, %eax           # EFER.LMA must be set
    jz end
    xorl %eax, %eax
    cpuid
    movl $0x201000, %eax         # another page table, as every context switch does
    movq %rax, %cr3
    movq %rax, %xmm0             # SSE, as CR4.OSFXSR allows
    movq %xmm0, %rbx
    cmpq %rax, %rbx
    jne end
    movl $tick, %eax             # IDT entry 0x20, a 64-bit interrupt gate
    movl $0x204200, %edi
    movw %ax, (%rdi)
    movw $8, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    shrl $16, %eax
    movw %ax, 6(%rdi)
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
    cli
    cmpl $20, %ebp               # until twenty timer interrupts came
    jb wait
    movl $0x3f8, %edx
    movb $'O', %al
    outb %al, %dx
    movb $'K', %al
    outb %al, %dx
    movb $'\n', %al
    outb %al, %dx
end:
    movb $0xfe, %al
    outb %al, $0x64
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
    .quad 0x204000
.section .note.GNU-stack, "", @progbits
